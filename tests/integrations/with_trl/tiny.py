"""A model of a few thousand parameters, its tokenizer, and TRL's trainers of it, for one step."""

import inspect
from typing import Any, NamedTuple

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

VOCAB, BATCH, COMPLETION = 200, 4, 8
WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(VOCAB - 2))]


class Step(NamedTuple):
    """What one step of a trainer gives."""

    loss: float
    gradients: dict[str, torch.Tensor]
    log: dict[str, Any]


def tokenizer():
    """Each word is a token."""
    model = models.WordLevel({word: i for i, word in enumerate(WORDS)})
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def saved_model(folder):
    """A Qwen3, saved: TRL reads reference models from a folder."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(5.0)  # else all tokens are about as likely
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def words(start, stride, count):
    """Some text."""
    return " ".join(WORDS[2 + (start + stride * i) % (VOCAB - 2)] for i in range(count))


def reward(prompts, completions, **_):
    """Differs from completion to completion, or all advantages would be 0."""
    return [float(sum(map(len, text.split())) % 7) for text in completions]


PROMPTS = [words(7 * i, 3, 4) for i in range(16)]
PAIRS = [
    {"prompt": prompt + " ", "chosen": words(5 * i, 1, 8), "rejected": words(11 * i, 2, 6)}
    for i, prompt in enumerate(PROMPTS)
]


def trainer_of(algorithm, folder, *, peft_config=None, **settings):
    """A trainer of TRL: grpo, rloo, sft, dpo or kto."""
    name = algorithm.upper()
    config, trainer = getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")
    common: dict[str, Any] = {
        "output_dir": f"{folder}/out",
        "max_steps": 1,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "seed": 0,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
    }
    special: dict[str, Any] = {}
    rows: list[dict[str, Any]] = PAIRS
    if algorithm in ("grpo", "rloo"):
        common |= {
            "num_generations": BATCH,
            "max_completion_length": COMPLETION,
            "temperature": 0.7,
            "beta": 0.1,
        }
        special, rows = {"reward_funcs": reward}, [{"prompt": each} for each in PROMPTS]
    elif algorithm == "sft":
        rows = [{"prompt": each["prompt"], "completion": each["chosen"]} for each in PAIRS]
    elif algorithm == "kto":
        rows = [
            {"prompt": each["prompt"], "completion": each["chosen"], "label": i % 2 == 0}
            for i, each in enumerate(PAIRS)
        ]
    known = inspect.signature(config).parameters
    settings = {name: value for name, value in (common | settings).items() if name in known}
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return trainer(
        model=model,
        args=config(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=peft_config,
        **special,
    )


class KeepGradients(TrainerCallback):
    """Copies the gradients before the optimizer's step."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        """Called by the trainer."""
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.gradients[name] = parameter.grad.clone()


def step(trainer):
    """Trains one step."""
    keep, losses = KeepGradients(), []
    trainer.add_callback(keep)
    training_step = trainer.training_step

    def with_loss(*args, **kwargs):
        losses.append(training_step(*args, **kwargs).item())
        return torch.tensor(losses[-1])

    trainer.training_step = with_loss
    trainer.train()
    return Step(losses[0], keep.gradients, trainer.state.log_history[0])
