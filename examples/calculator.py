"""A tiny model learns to use a calculator: episodes of two turns, trained by `PPOTrainer.step`.

A question is `7 * 8`. The policy may answer at once, `answer 54`, or ask the calculator, `call
7 * 8`, which writes `result 56` behind it; then the policy has a second turn. A right answer earns
1. The model is made here, and first learns how turns look from texts that guess, call wrongly, and
misread results. The words of the calculator are no part of the loss: their mask is 0.

    python examples/calculator.py       # a minute on one thread
"""

import argparse
import operator
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from fastpg.trainer import PPOConfig, PPOTrainer

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
QUESTIONS = [
    f"{a} {sign} {b}"
    for a in range(10)
    for b in range(10)
    for sign, operation in OPERATIONS.items()
    if operation(a, b) >= 0
]
NUMBERS = [str(number) for number in range(82)]
WORDS = ["<pad>", "<eos>", "call", "result", "answer", *OPERATIONS, *NUMBERS]
EOS = 1


def value_of(question):
    a, sign, b = question.split()
    return str(OPERATIONS[sign](int(a), int(b)))


def split_questions():
    """Questions to train on, and a fifth of all to be asked at the end."""
    shuffled = random.Random(0).sample(QUESTIONS, len(QUESTIONS))
    return shuffled[len(shuffled) // 5 :], shuffled[: len(shuffled) // 5]


def make_tokenizer():
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def make_model():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=len(WORDS), tie_word_embeddings=True, **sizes, **heads)
    return Qwen3ForCausalLM(config)


def written(question, rng):
    """A text to imitate: half of them guess, half call, and of these some make a mistake."""
    if rng.random() < 0.5:
        return f"{question} answer {rng.choice(NUMBERS)} <eos>"
    asked = rng.choice(QUESTIONS) if rng.random() < 0.3 else question
    result = value_of(asked)
    answer = rng.choice(NUMBERS) if rng.random() < 0.3 else result
    return f"{question} call {asked} <eos> result {result} answer {answer} <eos>"


def imitate(model, tokenizer, questions, steps, rng):
    """Teach the model how turns look, by cross-entropy."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        texts = [written(question, rng) for question in rng.choices(questions, k=64)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask).logits
        labels = ids[:, 1:].where(mask[:, 1:] == 1, -100)
        cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def calculator(words):
    """What the calculator writes behind a turn; None if the turn does not call it rightly."""
    question = " ".join(words[1:-1])
    if words[0] == "call" and words[-1] == "<eos>" and question in QUESTIONS:
        return ["result", value_of(question)]
    return None


def play(trainer, questions):
    """Ask the policy. Returns queries, responses, their masks, and scores, as `step` takes them."""
    tokenizer = trainer.tokenizer
    queries = [tokenizer(question)["input_ids"] for question in questions]
    responses = [turn.tolist() for turn in trainer.generate(queries)]
    masks = [[1] * len(response) for response in responses]
    results = [calculator(tokenizer.convert_ids_to_tokens(response)) for response in responses]
    calling = [i for i, result in enumerate(results) if result is not None]
    for i in calling:
        responses[i] += tokenizer.convert_tokens_to_ids(results[i])
        masks[i] += [0] * len(results[i])
    seconds = trainer.generate([queries[i] + responses[i] for i in calling]) if calling else []
    for i, turn in zip(calling, seconds, strict=True):
        responses[i] += turn.tolist()
        masks[i] += [1] * len(turn)
    ends = [tokenizer.convert_ids_to_tokens(response[-3:]) for response in responses]
    right = [["answer", value_of(question), "<eos>"] for question in questions]
    scores = [float(end == answer) for end, answer in zip(ends, right, strict=True)]
    return queries, responses, masks, scores


def success(trainer, questions):
    """The share of right answers, each question asked four times."""
    *_, scores = play(trainer, questions * 4)
    return sum(scores) / len(scores)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="steps of reinforcement learning")
    parser.add_argument("--imitation_steps", type=int, default=600, help="steps before them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="out/calculator")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    train, held_out = split_questions()
    tokenizer, model = make_tokenizer(), make_model()
    imitate(model, tokenizer, train, options.imitation_steps, rng)
    args = PPOConfig(
        output_dir=options.output_dir,
        num_steps=options.steps,
        max_new_tokens=6,  # of one turn
        learning_rate=5e-4,
        value_learning_rate=1e-2,
        kl_coef=0.0,
        micro_batch_size=64,
        save_steps=None,
        seed=options.seed,
    )
    trainer = PPOTrainer(model, None, args, processing_class=tokenizer)
    trainer.seed()
    before = success(trainer, held_out)
    for _ in range(args.num_steps):
        queries, responses, masks, scores = play(trainer, rng.sample(train, 128))
        trainer.step(queries, responses, scores, masks)
    after = success(trainer, held_out)
    for question, response in zip(held_out[:4], play(trainer, held_out[:4])[1], strict=True):
        print(f"{question} | {tokenizer.decode(response)}")
    print(f"Right answers to unseen questions: {before:.0%} before, {after:.0%} after.")
    return before, after


if __name__ == "__main__":
    torch.set_num_threads(1)  # Two would wait for each other with a model as small as this.
    main()
