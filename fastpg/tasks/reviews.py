"""The embedded task: teach a tiny language model to write kind film reviews.

Everything is made here, so nothing is downloaded: a grammar of one-line reviews, a word-level
tokenizer over its 43 words, and a Qwen3 of 0.3 million parameters. The model first learns the
grammar from text that is half praise, half scorn (score about 0); then praise is rewarded:

    score = (positive - negative) / (positive + negative)    over the adjectives of the completion

The KL penalty to the supervised model is what keeps the reviews varied and grammatical.
"""

import random
import re

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from fastpg.trainer import PPOConfig, PPOTrainer

PAD, EOS = "<pad>", "<eos>"
OPENERS = ["honestly", "overall", "frankly"]
ARTICLES = ["the", "this"]
NOUNS = ["story", "acting", "plot", "ending", "music", "cast", "dialogue", "pacing"]
VERBS = ["was", "felt", "seemed"]
ADVERBS = ["very", "rather", "truly", "quite", "so", "often"]
POSITIVE = ["clever", "charming", "brilliant", "moving", "funny", "superb", "fresh", "elegant"]
NEGATIVE = ["clumsy", "boring", "awful", "dull", "silly", "weak", "stale", "lazy"]
WORDS = [*OPENERS, *ARTICLES, *NOUNS, *VERBS, *ADVERBS, *POSITIVE, *NEGATIVE, "and", "but", "."]

SUPERVISED_STEPS = 300

INTRODUCTION = """\
No --model given, so here is the embedded task. A tiny model first learns to write film
reviews (supervised, some 15 seconds); then {algorithm} teaches it to praise."""

DEFAULTS = {
    "output_dir": "out/reviews",
    "num_steps": 30,
    "rollout_batch_size": 128,
    "max_new_tokens": 12,
    "micro_batch_size": 64,
    "learning_rate": 2e-4,
    "value_learning_rate": 1e-2,
    "kl_coef": 0.1,
    "missing_eos_penalty": 1.0,
    "reward_weights": [1.0, 0.0],  # `grammatical` is watched, not rewarded
}
"""The settings of `fastpg train` with no arguments, where they differ from `PPOConfig`."""

OF_ALGORITHM = {
    # One step on each rollout, not eight: a larger one.
    "reinforce": {"learning_rate": 2e-3},
    "vpg": {"learning_rate": 2e-3},
    "rloo": {"learning_rate": 2e-3},
    # The mean log-ratio of six tokens moves much further than that of a thousand.
    "gspo": {"cliprange": 0.01},
}
"""And what an algorithm needs to be different."""


def subjects() -> list[str]:
    """Every way to begin a review: `[opener] article noun verb`."""
    return [
        " ".join(filter(None, (opener, article, noun, verb)))
        for opener in ("", *OPENERS)
        for article in ARTICLES
        for noun in NOUNS
        for verb in VERBS
    ]


def opinion(rng: random.Random) -> str:
    """The rest of a review: an adjective, `and` another of its kind or `but` one of the other."""
    kinds = rng.sample([POSITIVE, NEGATIVE], 2)
    conjunction, second = rng.choice([("and", kinds[0]), ("but", kinds[1])])
    phrases = [_phrase(rng, kinds[0]), conjunction, _phrase(rng, second)]
    return " ".join([*(phrases if rng.random() < 0.5 else phrases[:1]), "."])


def _phrase(rng: random.Random, adjectives: list[str]) -> str:
    return " ".join([*rng.sample(ADVERBS, rng.randint(0, 1)), rng.choice(adjectives)])


def praise(prompts: list[str], completions: list[str]) -> list[float]:
    """The reward, in [-1, 1]: the balance of positive and negative adjectives."""
    return [_balance(completion.split()) for completion in completions]


def _balance(words: list[str]) -> float:
    positive = sum(word in POSITIVE for word in words)
    negative = sum(word in NEGATIVE for word in words)
    return (positive - negative) / max(positive + negative, 1)


def _one_of(words: list[str]) -> str:
    return f"(?:{'|'.join(words)})"


_PHRASE = f"(?:{_one_of(ADVERBS)} )?{_one_of(POSITIVE + NEGATIVE)}"
_REVIEW = re.compile(
    f"(?:{_one_of(OPENERS)} )?{_one_of(ARTICLES)} {_one_of(NOUNS)} {_one_of(VERBS)} "
    rf"{_PHRASE}(?: (?:and|but) {_PHRASE})? \."
)


def grammatical(text: str) -> bool:
    """Whether `text` is one whole sentence of the grammar."""
    return _REVIEW.fullmatch(text) is not None


def grammar(prompts: list[str], completions: list[str]) -> list[float]:
    """Watched beside the reward: 1 for a grammatical review."""
    return [float(grammatical(f"{p} {c}")) for p, c in zip(prompts, completions, strict=True)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word, one for padding and one for the end."""
    vocabulary = {word: i for i, word in enumerate([PAD, EOS, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=EOS)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of two layers with random weights.

    Not a Qwen2: next to one, `AutoTokenizer` ignores the tokenizer that was saved for its own.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def supervise(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> float:
    """Teach `model` the grammar on `steps` batches of random reviews. Returns the last loss."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    beginnings = subjects()
    for _ in range(steps):
        texts = [f"{rng.choice(beginnings)} {opinion(rng)} {EOS}" for _ in range(64)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def build_trainer(args: PPOConfig) -> PPOTrainer:
    """The task, ready for `train()`: makes the model and teaches it the grammar."""
    torch.set_num_threads(1)  # the model is so small that threads only wait for each other
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed)
    supervise(model, tokenizer, SUPERVISED_STEPS, args.seed)
    prompts = [{"prompt": subject} for subject in subjects()]
    random.Random(args.seed).shuffle(prompts)
    return PPOTrainer(
        model,
        [praise, grammar],
        args,
        train_dataset=prompts[args.num_eval_samples :],
        eval_dataset=prompts[: args.num_eval_samples],
        processing_class=tokenizer,
    )
