"""The regular expressions by which byte-level tokenizers cut texts into words, in the syntax of `tokenizers`.

They are those of the models' own tokenizer.json files, applied one after the other. GGUF files name them; the names
are llama.cpp's (github.com/ggml-org/llama.cpp, src/llama-vocab.cpp).
"""

from __future__ import annotations

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_LONG = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|NUMBER| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = _LONG.replace("NUMBER", r"\p{N}")
LLAMA3 = _LONG.replace("NUMBER", r"\p{N}{1,3}")
_DIGIT = r"\p{N}"
_CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"  # DeepSeek's own idea of it, with what lies below
_CASED = r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"  # spelt out character by character there, as of Unicode 12
_MARKS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_V3 = r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

BY_NAME: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (_DIGIT, GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx"), (LLAMA3,)),
    **dict.fromkeys(("chatglm-bpe", "glm4"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), (QWEN2,)),
    "deepseek-llm": (r"[\r\n]", _CASED, _MARKS, r"\s+$", _CHINESE, _DIGIT),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, _DIGIT),
    "deepseek-v3": (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK_V3),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), (r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    "default": _DEFAULT,
}
# Names whose texts are brought into Unicode's NFC first; whose words are tokens where they can be, whatever the
# merges say; and whose texts begin with the beginning-of-sequence token unless the file says otherwise.
NFC = ("qwen2", "deepseek-r1-qwen")
WHOLE_WORDS = ADD_BOS = ("llama-bpe", "llama3", "llama-v3")
