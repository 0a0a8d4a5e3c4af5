"""What the trainer uses of vLLM, on a CPU: a model of transformers behind vLLM's names.

`python tests/trainer/vllm_stub.py vllm-X.whl > tests/trainer/vllm_api.txt` records the names of
another version. A call with a name that is not among them raises.
"""

import ast
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

RECORD = Path(__file__).with_name("vllm_api.txt")
SOURCES = {
    "vllm/outputs.py": ("RequestOutput", "CompletionOutput", "SamplingMask"),
    "vllm/logprobs.py": ("Logprob",),
    "vllm/sampling_params.py": ("SamplingParams",),
    "vllm/engine/arg_utils.py": ("EngineArgs",),
    "vllm/entrypoints/llm.py": ("LLM",),
}
METHODS = {"LLM": ("__init__", "generate", "apply_model", "reset_prefix_cache")}


def recorded() -> dict[str, list[str]]:
    """The fields of vLLM's classes and the parameters of its methods, in their order."""
    lines = RECORD.read_text().splitlines()[1:]
    return {name: rest.split() for name, _, rest in (line.partition(": ") for line in lines)}


def record(wheel: str) -> None:
    """Prints what a wheel of vLLM has."""
    print("-".join(Path(wheel).name.split("-")[:2]))
    with zipfile.ZipFile(wheel) as archive:
        for path, names in SOURCES.items():
            for node in ast.parse(archive.read(path)).body:
                if isinstance(node, ast.ClassDef) and node.name in names:
                    for name, fields in _names_of(node).items():
                        print(f"{name}: {' '.join(fields)}")


def _names_of(node: ast.ClassDef) -> dict[str, list[str]]:
    """A class's public fields or parameters, and those of its methods that are looked at."""
    fields = [
        each.target.id
        for each in node.body
        if isinstance(each, ast.AnnAssign) and not each.target.id.startswith("_")
    ]
    methods = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
    parameters = {
        name: [a.arg for a in (*method.args.args, *method.args.kwonlyargs) if a.arg != "self"]
        for name, method in methods.items()
    }
    if node.name in METHODS:
        return {f"{node.name}.{name}": parameters[name] for name in METHODS[node.name]}
    return {node.name: fields or parameters["__init__"]}


def _check(name: str, given: dict) -> None:
    known = recorded()
    legal = known[name] + (known["EngineArgs"] if name == "LLM.__init__" else [])
    if unknown := set(given) - set(legal):
        raise TypeError(f"{name} has no {unknown}")


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class SamplingMask:
    token_ids: list[list[int]]


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    sampling_mask: SamplingMask | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: None
    outputs: list[CompletionOutput]
    finished: bool


class SamplingParams:
    def __init__(self, **given):
        _check("SamplingParams", given)
        vars(self).update(given)


class _Model(torch.nn.Module):
    """A model as vLLM has it, with weights that are no gradient's business."""

    def __init__(self, model):
        super().__init__()
        self.model = model.requires_grad_(False)

    def load_weights(self, weights):
        own = dict(self.model.named_parameters())
        for name, weight in weights:
            own.pop(name).copy_(weight)
        assert not own, f"no weights for {set(own)}"


class LLM:
    """Samples token by token; `off` is what its log-probs are off by, on average."""

    off = 0.0

    def __init__(self, **given):
        _check("LLM.__init__", given)
        assert given["load_format"] == "dummy"
        assert given["logprobs_mode"] == "processed_logprobs"
        self.options = given
        torch.manual_seed(99)  # dummy weights are not those of the trainer
        config = AutoConfig.from_pretrained(given["model"])
        assert config.architectures == ["Qwen3ForCausalLM"]
        self.model = _Model(AutoModelForCausalLM.from_config(config).eval())
        self.resets = 0
        self.tokenizer = None
        if not given["skip_tokenizer_init"]:
            self.tokenizer = AutoTokenizer.from_pretrained(given["model"])

    def apply_model(self, func):
        return [func(self.model)]

    def reset_prefix_cache(self):
        self.resets += 1
        return True

    def generate(self, prompts, sampling_params, *, use_tqdm=True):
        pairs = zip(prompts, sampling_params, strict=True)
        return [self._complete(i, *pair) for i, pair in enumerate(pairs)]

    @torch.no_grad()
    def _complete(self, number, prompt, params):
        g = torch.Generator().manual_seed(params.seed)
        ids, tokens, logprobs, masks = prompt["prompt_token_ids"], [], [], []
        is_ended = False
        while len(tokens) < params.max_tokens and not is_ended:
            logits = self.model.model(torch.tensor([ids + tokens])).logits[0, -1]
            order = logits.argsort(descending=True)[: params.top_k or None]
            p = (logits[order] / params.temperature).softmax(0)
            kept = p.cumsum(0) - p < params.top_p
            order, p = order[kept], p[kept] / p[kept].sum()
            drawn = int(torch.multinomial(p, 1, generator=g))
            noise = self.off * float(torch.randn((), generator=g))
            logprobs.append({int(order[drawn]): Logprob(float(p[drawn].log()) + noise, drawn + 1)})
            masks.append(order.tolist())
            tokens.append(int(order[drawn]))
            is_ended = tokens[-1] in params.stop_token_ids
            if params.detokenize:
                text = self.tokenizer.decode(tokens)
                is_ended |= any(string in text for string in params.stop or ())
        mask = SamplingMask(masks) if self.options.get("return_sampling_mask") else None
        total = sum(each.logprob for place in logprobs for each in place.values())
        output = CompletionOutput(
            0, "", tokens, total, logprobs, "stop" if is_ended else "length", None, mask
        )
        return RequestOutput(str(number), None, ids, None, [output], True)


if __name__ == "__main__":
    record(sys.argv[1])
