"""Which prompt a model's conversations become: the file's own choice, the checkpoint's template, or a built-in format.

RULES is all there is to know of families here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flm.cluster.prompts.prompt_formats import FORMATS, PromptFormat, rounds
from flm.cluster.prompts.templates import FIX_TOKEN, ChatTemplate
from flm.worker.errors import ConfigError, FlmError
from flm.worker.files.gguf_file import GGUFFile
from flm.worker.files.json_fields import Fields, read_json
from flm.worker.vocabularies.tokenizer import Tokenizer

TEXTS = ("pre_prompt", "user_role", "bot_role", "history_sep")  # fastllm's


@dataclass(frozen=True)
class PromptChoice:
    """What cluster.yaml says: the name of a built-in format, or fastllm's four texts; nothing: the checkpoint decides."""

    name: str = ""
    texts: tuple[str, str, str, str] | None = None


BY_CHECKPOINT = PromptChoice()


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of itself: its architecture, and every name that it has or had, in lower case."""

    architecture: str = ""
    names: str = ""


@dataclass(frozen=True)
class Rule:
    """All that is given must hold. name: a pattern somewhere in the checkpoint's names; tokens: those that the
    vocabulary must have; vocab: its size."""

    format: str
    architectures: tuple[str, ...] = ()
    name: str = ""
    tokens: tuple[str, ...] = ()
    vocab: int = 0

    def holds(self, facts: Facts, tokenizer: Tokenizer) -> bool:
        return (
            (not self.architectures or facts.architecture in self.architectures)
            and (not self.name or re.search(self.name, facts.names) is not None)
            and all(tokenizer.token_id(token) is not None for token in self.tokens)
            and self.vocab in (0, tokenizer.vocab_size)
        )


_LLAMA = ("LlamaForCausalLM", "LLaMAForCausalLM", "llama")
_BAICHUAN = ("BaichuanForCausalLM", "BaiChuanForCausalLM", "baichuan")

# The first that holds. GGUF's architectures stand beside those of config.json.
RULES: tuple[Rule, ...] = (
    Rule("codegeex4", name="codegeex4", tokens=("[gMASK]", "<sop>", "<|user|>")),
    Rule("glm4", tokens=("[gMASK]", "<sop>", "<|user|>")),
    Rule("chatglm", tokens=("[gMASK]", "<sop>")),
    Rule("chatglm3", name="chatglm3", tokens=("[gMASK]", "sop")),
    Rule("chatglm2", tokens=("[gMASK]", "sop")),
    Rule("qwen", ("QWenLMHeadModel", "qwen")),
    Rule("baichuan2", _BAICHUAN, vocab=125696),
    Rule("baichuan", _BAICHUAN),
    Rule("xverse", ("XverseForCausalLM", "xverse")),
    Rule("internlm2", ("InternLM2ForCausalLM", "internlm2"), tokens=("<|im_start|>", "<|im_end|>")),
    Rule("internlm", ("InternLMForCausalLM",)),
    Rule("minicpm", ("MiniCPMForCausalLM", "minicpm")),
    Rule("moss", ("MossForCausalLM",)),
    Rule("rwkv-raven", ("RwkvForCausalLM",)),
    Rule("belle", ("BloomForCausalLM", "bloom")),
    Rule("deepseek-v3", ("DeepseekV3ForCausalLM", "deepseek2"), tokens=("<｜User｜>", "<｜Assistant｜>")),
    Rule("deepseek-v2", ("DeepseekV2ForCausalLM", "deepseek2")),
    # Llamas of many names: what they were taught is in their names only
    Rule("deepseek-coder", _LLAMA, "deepseek.?coder"),
    Rule("vicuna", _LLAMA, "vicuna"),
    Rule("billa", _LLAMA, "billa"),
    Rule("chinese-alpaca-2", _LLAMA, "chinese.?alpaca.?2"),
    Rule("alpaca", _LLAMA, "alpaca"),
    Rule("belle-llama", _LLAMA, "belle"),
    Rule("llama2-chinese", _LLAMA, "llama-?2-chinese|atom-|flagalpha"),
    Rule("yulan", _LLAMA, "yulan"),
    Rule("wizardcoder", _LLAMA, "wizardcoder"),
    Rule("sus-chat", _LLAMA, "sus-chat"),
    Rule("llama2", _LLAMA, "llama-?2.*chat|codellama.*instruct"),
    Rule("llama3", tokens=("<|start_header_id|>", "<|eot_id|>")),
    Rule("chatml", tokens=("<|im_start|>", "<|im_end|>")),
)

# Special tokens that texts of the formats above spell; InternLM's and YuLan's roles are plain text.
_SPELT = (
    "<s>",
    "</s>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<|EOT|>",
    "<eoh>",
    "<eoa>",
    "<eom>",
)
# Tokens that end a turn, in templates that checkpoints bring along.
_TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|EOT|>",
    "<end_of_turn>",
    "<eoa>",
    "<eom>",
)


def choose_template(choice: PromptChoice, tokenizer: Tokenizer, path: Path | None) -> ChatTemplate:
    """The template of the model at `path`. Chat says what is wrong with one that cannot be used; what cluster.yaml
    asks for must be right: ConfigError."""
    if choice.texts is not None:
        return _built_in("the prompt in cluster.yaml", rounds(*choice.texts), tokenizer, strict=True)
    if choice.name:
        return _built_in(f"prompt_format {choice.name}", FORMATS[choice.name], tokenizer, strict=True)
    texts = _texts_of(path) if path is not None else None
    if texts is not None:
        return _built_in("the prompt in its config.json", rounds(*texts), tokenizer, strict=False)
    if tokenizer.chat_template is not None:
        return ChatTemplate(
            tokenizer.chat_template,
            tokenizer.bos_token or "",
            tokenizer.eos_token or "",
            token_id=tokenizer.token_id,
            stop_ids=_ids(tokenizer, _turn_ends(tokenizer.chat_template)),
        )
    facts = read_facts(path) if path is not None else Facts()
    rule = next((rule for rule in RULES if rule.holds(facts, tokenizer)), None)
    if rule is None:
        known = ", ".join(sorted(FORMATS))
        return ChatTemplate.unusable(
            "this model has no chat template, and none is known for it; expected prompt_format in cluster.yaml "
            f"(one of {known}), or pre_prompt, user_role, bot_role and history_sep there"
        )
    return _built_in(f"prompt_format {rule.format}", FORMATS[rule.format], tokenizer, strict=False)


def _turn_ends(template: str) -> tuple[str, ...]:
    ends = (
        FORMATS["glm4"].stop if "[gMASK]<sop>" in template else ()
    )  # a GLM-4's answer ends where another role begins
    return (*ends, *(end for end in _TURN_ENDS if end in template))


def _built_in(what: str, format: PromptFormat, tokenizer: Tokenizer, *, strict: bool) -> ChatTemplate:
    problem = next(_problems(format, tokenizer), "")
    if problem and strict:
        raise ConfigError(f"{what} does not go with this model: {problem}")
    if problem:
        return ChatTemplate.unusable(f"{what}, this model's own, does not go with it: {problem}")
    return ChatTemplate(
        format.program,
        tokenizer.bos_token or "",
        tokenizer.eos_token or "",
        texts=format.texts,
        token_id=tokenizer.token_id,
        stop_ids=_ids(tokenizer, format.stop),
        stop_strings=format.stop_strings,
    )


def _problems(format: PromptFormat, tokenizer: Tokenizer) -> Iterator[str]:
    text = "\n".join([format.program, *map(str, format.texts.values())])
    named = re.findall(r"token\('([^']+)'\)", format.program)
    for token in [*(token for token in _SPELT if token in text), *named]:
        if tokenizer.token_id(token) is None:
            yield f"its tokenizer has no token {token!r}"
    for found in FIX_TOKEN.finditer(text):
        if int(found[1]) >= tokenizer.vocab_size:
            yield f"{found[0]}: an id below {tokenizer.vocab_size} expected"


def _ids(tokenizer: Tokenizer, tokens: Iterator[str] | tuple[str, ...]) -> tuple[int, ...]:
    """Of those that the vocabulary has."""
    found = (tokenizer.token_id(token) for token in tokens)
    return tuple(sorted({i for i in found if i is not None}))


def _texts_of(path: Path) -> tuple[str, str, str, str] | None:
    """The four texts that fastllm's users add to config.json, where one of them is there."""
    try:
        config = read_json(path / "config.json") if path.is_dir() else Fields(path, {})
    except FlmError:  # its replicas say why
        return None
    texts = [config.get(name) for name in TEXTS]
    if not any(isinstance(text, str) for text in texts):
        return None
    pre_prompt, user_role, bot_role, history_sep = (text if isinstance(text, str) else "" for text in texts)
    return pre_prompt, user_role, bot_role, history_sep


def read_facts(path: Path) -> Facts:
    """Facts of a directory or a .gguf file; none where they cannot be read: its replicas say why."""
    try:
        if not path.is_dir():
            file = GGUFFile(path)
            kept = [file.get(f"general.{key}") for key in ("name", "basename", "finetune")]
            return Facts(str(file.get("general.architecture")), _names(path, kept))
        config = read_json(path / "config.json")
        architectures = config.get("architectures")
        own = (
            read_json(path / "tokenizer_config.json")
            if (path / "tokenizer_config.json").is_file()
            else config
        )
        kept = [config.get("_name_or_path"), own.get("name_or_path")]
        first = architectures[0] if isinstance(architectures, list) and architectures else ""
        return Facts(str(first), _names(path, kept))
    except FlmError:
        return Facts(names=_names(path, []))


def _names(path: Path, kept: list[object]) -> str:
    return " ".join([path.name, *(value for value in kept if isinstance(value, str))]).lower()
