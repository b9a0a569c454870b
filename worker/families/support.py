"""The models that are supported, and how each was verified: what `flm-cluster models` and docs/models.md say.

"golden logits": a tiny checkpoint of that architecture gives the logits that its own code computes, on one, two and three
ranks. "formula": the same against a decoder written from the formulas. "shapes": config and tensor names were read, no logits
were at hand. Checkpoints of any size of an architecture are read alike: config.json and tensors decide, not the name.
"""

from __future__ import annotations

from dataclasses import dataclass

from flm.worker.files.paths import MODEL_PARALLEL

VERIFIED = ("golden logits", "formula", "shapes", "refused")


@dataclass(frozen=True)
class Support:
    """Models of one architecture that were verified in the same way. `golden`: names of the checkpoints that did it."""

    architecture: str
    models: tuple[str, ...]
    verified: str
    golden: tuple[str, ...] = ()
    note: str = ""


def _sizes(stem: str, *sizes: str) -> tuple[str, ...]:
    return tuple(stem.replace("*", size) for size in sizes)


_WINDOW = "its layers have a sliding window, which is not supported"
_GOLDEN = "golden logits"
_LLAMA = (
    *_sizes("meta-llama/Llama-2-*-chat-hf", "7b", "13b", "70b"),
    *_sizes("codellama/CodeLlama-*-Instruct-hf", "7b", "13b", "34b"),
    "LLaMA 1 (7B to 65B)", "Vicuna v1.1, v1.3", "Chinese-Alpaca", "Chinese-Alpaca-2",
    "FlagAlpha/Llama2-Chinese", "FlagAlpha/Atom-7B", "yulan-team/YuLan-Chat-2-13b", "WizardLM/WizardCoder-Python",
    *_sizes("meta-llama/Meta-Llama-3-*-Instruct", "8B", "70B"), "HuggingFaceTB/SmolLM2",
)  # fmt: skip
_DEEPSEEK_V2 = (
    "deepseek-ai/DeepSeek-V2-Chat", "deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-ai/DeepSeek-Coder-V2-Instruct",
    "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct",
)  # fmt: skip

SUPPORT = (
    Support("LlamaForCausalLM", _LLAMA, _GOLDEN, ("llama2",)),
    Support("LlamaForCausalLM", ("BiLLa-7B-SFT",), _GOLDEN, ("llama2",), "merge its embedding delta first"),
    Support("LlamaForCausalLM", _sizes("meta-llama/Llama-3.1-*-Instruct", "8B", "70B"), _GOLDEN, ("llama31",)),
    Support("LlamaForCausalLM", _sizes("01-ai/Yi-*-Chat", "6B", "34B"), _GOLDEN, ("llama2",)),
    Support("LlamaForCausalLM", _sizes("01-ai/Yi-Coder-*-Chat", "1.5B", "9B"), _GOLDEN, ("llama2",)),
    Support("LlamaForCausalLM", ("SUSTech/SUS-Chat-34B",), _GOLDEN, ("llama2",)),
    Support("YiForCausalLM", ("01-ai/Yi, oldest revisions",), "shapes", note="Llama with norms under other names"),
    Support(
        "LlamaForCausalLM",
        (*_sizes("deepseek-ai/deepseek-coder-*-instruct", "1.3b", "6.7b", "33b"),
         "deepseek-ai/deepseek-coder-7b-instruct-v1.5"),
        _GOLDEN, ("llama_linear",), "linear RoPE scaling",
    ),
    Support("XverseForCausalLM", _sizes("xverse/XVERSE-*-Chat", "7B", "13B"), "shapes", note="Llama's formulas"),
    Support("XverseForCausalLM", ("xverse/XVERSE-13B-256K",), _GOLDEN, ("llama_dynamic_long",),
            "set rope_theta 500000 and rope_scaling dynamic in config.json; the scaling is fixed per request"),
    Support("InternLMForCausalLM", _sizes("internlm/internlm-chat-*", "7b", "20b"), _GOLDEN, ("internlm1",)),
    Support("InternLM2ForCausalLM", _sizes("internlm/internlm2-chat-*", "1_8b", "7b", "20b"), _GOLDEN, ("internlm2",)),
    Support("InternLM3ForCausalLM", ("internlm/internlm3-8b-instruct",), "shapes",
            note="Llama's formulas; dynamic RoPE scaling, fixed per request"),
    Support("QWenLMHeadModel", _sizes("Qwen/Qwen-*-Chat", "1_8B", "7B", "14B", "72B"), _GOLDEN,
            ("qwen1", "qwen1_long"), "dynamic NTK and log-n attention, fixed per request"),
    Support("Qwen2ForCausalLM",
            _sizes("Qwen/Qwen1.5-*-Chat", "0.5B", "1.8B", "4B", "7B", "14B", "32B", "72B", "110B"), _GOLDEN, ("qwen2",)),
    Support("Qwen2ForCausalLM", ("Qwen/CodeQwen1.5-7B-Chat",), _GOLDEN, ("qwen2",)),
    Support("Qwen2ForCausalLM", _sizes("Qwen/Qwen2-*-Instruct", "0.5B", "1.5B", "7B", "72B"), _GOLDEN, ("qwen2",)),
    Support("Qwen2ForCausalLM", _sizes("Qwen/Qwen2.5-*-Instruct", "0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"),
            _GOLDEN, ("qwen2", "qwen25_yarn"), "YaRN beyond 32K where config.json asks for it"),
    Support("Qwen3ForCausalLM", _sizes("Qwen/Qwen3-*", "0.6B", "1.7B", "4B", "8B", "14B", "32B"), _GOLDEN, ("qwen3",)),
    Support("Qwen2MoeForCausalLM", ("Qwen/Qwen1.5-MoE-A2.7B-Chat", "Qwen/Qwen2-57B-A14B-Instruct"), _GOLDEN, ("qwen2_moe",)),
    Support("Qwen3MoeForCausalLM", _sizes("Qwen/Qwen3-*", "30B-A3B", "235B-A22B"), _GOLDEN, ("qwen3_moe",)),
    Support("BaiChuanForCausalLM", ("baichuan-inc/Baichuan-7B",), _GOLDEN, ("baichuan7b",)),
    Support("BaichuanForCausalLM", ("baichuan-inc/Baichuan-13B-Chat",), _GOLDEN, ("baichuan2_13b",), "ALiBi"),
    Support("BaichuanForCausalLM", ("baichuan-inc/Baichuan2-7B-Chat",), _GOLDEN, ("baichuan7b", "baichuan2_13b"),
            "rotary, and a head of unit rows: each is in one of the two checkpoints"),
    Support("BaichuanForCausalLM", ("baichuan-inc/Baichuan2-13B-Chat",), _GOLDEN, ("baichuan2_13b",)),
    Support("MiniCPMForCausalLM", _sizes("openbmb/MiniCPM-2B-*-fp16", "sft", "dpo"), _GOLDEN, ("granite_for_minicpm",)),
    Support("GraniteForCausalLM", ("ibm-granite/granite-3",), _GOLDEN, ("granite_for_minicpm",)),
    Support("ChatGLMForConditionalGeneration",
            ("THUDM/chatglm2-6b", "THUDM/chatglm3-6b", "THUDM/glm-4-9b-chat", "THUDM/codegeex4-all-9b"), _GOLDEN,
            ("chatglm2",), "CodeGeeX4: set its system text as pre_prompt"),
    Support("ChatGLMForConditionalGeneration", _sizes("THUDM/chatglm2-6b-*", "int4", "int8"), "formula",
            note="rows of signed codes, checked against an independent unpacking"),
    Support("ChatGLMForConditionalGeneration",
            ("THUDM/chatglm2-6b-32k", "THUDM/chatglm3-6b-32k", "THUDM/chatglm3-6b-128k"), "shapes",
            note="rope_ratio divides positions for chatglm2-6b-32k and multiplies the base for the others"),
    Support("GlmForCausalLM", ("THUDM/glm-4-9b-chat-hf",), _GOLDEN, ("glm4_hf",)),
    Support("Glm4ForCausalLM", (*_sizes("THUDM/GLM-4-*-0414", "9B", "32B"), *_sizes("THUDM/GLM-Z1-*-0414", "9B", "32B")),
            _GOLDEN, ("glm4_0414",)),
    Support("DeepseekV2ForCausalLM", _DEEPSEEK_V2, _GOLDEN, ("deepseek_v2", "deepseek_v2_lite")),
    Support("DeepseekV3ForCausalLM", ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1"), _GOLDEN, ("deepseek_v3",)),
    Support("MossForCausalLM", ("fnlp/moss-moon-003-sft", "fnlp/moss-moon-003-sft-plugin"), _GOLDEN, ("moss",)),
    Support("MossForCausalLM", (*_sizes("fnlp/moss-moon-003-sft-*", "int4", "int8"),
            *_sizes("fnlp/moss-moon-003-sft-plugin-*", "int4", "int8")), "formula",
            note="GPTQ; a pickle, to be converted first; packed as its published code does, and unpacked independently"),
    Support("CodeGenForCausalLM", ("Salesforce/codegen",), _GOLDEN, ("codegen_for_moss",)),
    Support("BloomForCausalLM", ("BELLE-7B-2M", "bigscience/bloom"), _GOLDEN, ("bloom",)),
    Support("ChatGLMModel", ("THUDM/chatglm-6b", *_sizes("THUDM/chatglm-6b-*", "int4", "int8")), _GOLDEN, ("chatglm1",),
            "positions in two dimensions; a prompt is computed in one step"),
    Support("RwkvForCausalLM", ("RWKV/rwkv-4-raven",), _GOLDEN, ("rwkv4",), "a state per sequence; nothing to share; "
            "not halved every `rescale_every` layers, which transformers does without adapting eps: 2e-4 in 24 random layers"),
    Support("Phi3ForCausalLM", ("microsoft/Phi-3-mini-4k-instruct",), "refused", note=_WINDOW),
    Support("Gemma2ForCausalLM", _sizes("google/gemma-2-*", "9b", "27b"), "refused", note="every other layer has a sliding "
            "window, and scores and logits are capped; neither is there"),
    Support("TeleChat2ForCausalLM", _sizes("TeleAI/TeleChat2-*", "3B", "7B"), "refused",
            note="its layout was not at hand to be verified"),
    Support("MiniCPM3ForCausalLM", ("openbmb/MiniCPM3-4B",), "refused", note="its rotations are scaled by longrope, which is "
            "not supported"),
    Support("GLM130B", ("THUDM/GLM-130B",), "refused", note=MODEL_PARALLEL),
    Support("GLMModel", ("THUDM/glm-large-chinese",), "refused", note="an infilling model with learned block positions, not "
            "served as a chat model; its model_type is the same as GLM-4's"),
)  # fmt: skip
