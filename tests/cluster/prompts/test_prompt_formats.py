"""The built-in prompt formats: prompts written out, for one question, for two rounds, and with a system message.

The vocabulary here gives one id a character, puts "▁" in front of every text that is tokenised by itself, and has the
special tokens of all families.
"""

from __future__ import annotations

from functools import cache

import pytest

from flm.cluster.prompts.chat_prompt import render_chat
from flm.cluster.prompts.prompt_choice import PromptChoice, choose_template
from flm.cluster.prompts.prompt_formats import FORMATS
from flm.cluster.prompts.templates import ChatTemplate
from flm.worker.errors import InvalidRequest
from flm.worker.vocabularies.base import AddedToken, SplitVocabulary
from flm.worker.vocabularies.tokenizer import Tokenizer

MARKS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<eoh>",
    "<eoa>",
    "<eom>",
    "<|EOT|>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
]
FIRST = 0x110000  # ids of special tokens


class Characters(SplitVocabulary):
    pieces = None

    def _encode_run(self, run: str, first: bool, parse_special: bool) -> list[int]:
        return [ord(c) for c in "▁" + run]


ADDED = {
    mark: AddedToken(FIRST + i, after="[gMASK]" if mark == "sop" else "") for i, mark in enumerate(MARKS)
}
TOKENIZER = Tokenizer(Characters([], ADDED), bos_token="<s>", eos_token="</s>")
ASKED = [{"role": "user", "content": "hi"}]
TWICE = [*ASKED, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}]
BRIEF = [{"role": "system", "content": "be brief"}, *ASKED]


@cache
def named(name: str) -> ChatTemplate:
    return choose_template(PromptChoice(name), TOKENIZER, None)


def spelt(ids: list[int]) -> str:
    """Ids as text: special tokens in double angle brackets, so that none can be mistaken for text."""
    marks = {token.id: f"«{mark}»" for mark, token in ADDED.items()}
    return "".join(
        marks.get(i) or (f"«{i}»" if 0 < i < 200 and chr(i) not in PRINTABLE else chr(i)) for i in ids
    )


PRINTABLE = {chr(i) for i in range(32, 127)} | {"\n"}
POLITE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
INSTRUCTION = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
CODER = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer.\n"
)
YULAN = (
    "The following is a conversation between a human and an AI assistant namely YuLan, developed by GSAI, Renmin "
    "University of China. The AI assistant gives helpful, detailed, and polite answers to the user's questions.\n"
)
IM, END, SYS = "«<|im_start|>»", "«<|im_end|>»", "«<|system|>»"
BEGIN, STOP = "«<｜begin▁of▁sentence｜>»", "«<｜end▁of▁sentence｜>»"
HELPFUL = "<<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\n"
QWEN = f"{IM}▁system▁\n▁You are a helpful assistant.{END}▁\n"

# name: what two rounds become, what one with a system message becomes (None: there is no place for one)
EXPECTED: dict[str, tuple[str, str | None]] = {
    "chatml": (
        f"{IM}▁user\nhi{END}▁\n{IM}▁assistant\nyes{END}▁\n{IM}▁user\nwhy{END}▁\n{IM}▁assistant\n",
        f"{IM}▁system\nbe brief{END}▁\n{IM}▁user\nhi{END}▁\n{IM}▁assistant\n",
    ),
    "qwen": (
        f"{QWEN}{IM}▁user▁\n▁hi{END}▁\n{IM}▁assistant▁\n▁yes{END}▁\n{IM}▁user▁\n▁why{END}▁\n{IM}▁assistant▁\n",
        f"{IM}▁system▁\n▁be brief{END}▁\n{IM}▁user▁\n▁hi{END}▁\n{IM}▁assistant▁\n",
    ),
    "llama2": (
        "«<s>»▁[INST] hi [/INST] yes «</s>»«<s>»▁[INST] why [/INST]",
        "«<s>»▁[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nhi [/INST]",
    ),
    "chinese-alpaca-2": (
        f"«<s>»▁[INST] {HELPFUL}hi [/INST] yes «</s>»«<s>»▁[INST] why [/INST]",
        "«<s>»▁[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nhi [/INST]",
    ),
    "llama3": (
        (
            "«<|begin_of_text|>»«<|start_header_id|>»▁user«<|end_header_id|>»▁\n\nhi«<|eot_id|>»"
            "«<|start_header_id|>»▁assistant«<|end_header_id|>»▁\n\nyes«<|eot_id|>»"
            "«<|start_header_id|>»▁user«<|end_header_id|>»▁\n\nwhy«<|eot_id|>»"
            "«<|start_header_id|>»▁assistant«<|end_header_id|>»▁\n\n"
        ),
        (
            "«<|begin_of_text|>»«<|start_header_id|>»▁system«<|end_header_id|>»▁\n\nbe brief«<|eot_id|>»"
            "«<|start_header_id|>»▁user«<|end_header_id|>»▁\n\nhi«<|eot_id|>»"
            "«<|start_header_id|>»▁assistant«<|end_header_id|>»▁\n\n"
        ),
    ),
    "vicuna": (
        f"«<s>»▁{POLITE} USER: hi ASSISTANT: yes«</s>»▁USER: why ASSISTANT:",
        "«<s>»▁be brief USER: hi ASSISTANT:",
    ),
    "billa": ("«<s>»▁\nHuman: hi\nAssistant: yes\nHuman: why\nAssistant: ", None),
    "alpaca": (
        f"«<s>»▁{INSTRUCTION}### Instruction:\nhi\n\n### Response:\nyes\n\n### Instruction:\nwhy\n\n### Response:\n",
        "«<s>»▁be brief\n\n### Instruction:\nhi\n\n### Response:\n",
    ),
    "belle": ("▁Human: hi\n\nAssistant: yes\n\nHuman: why\n\nAssistant: ", None),
    "belle-llama": ("«<s>»▁Human: hi\n\nAssistant: yes\n\nHuman: why\n\nAssistant: ", None),
    "llama2-chinese": (
        "«<s>»▁Human: hi\n«</s>»«<s>»▁Assistant: yes\n«</s>»«<s>»▁Human: why\n«</s>»«<s>»▁Assistant: ",
        None,
    ),
    "yulan": (
        f"«<s>»▁{YULAN}[|Human|]:hi\n[|AI|]:yes\n[|Human|]:why\n[|AI|]:",
        "«<s>»▁be brief\n[|Human|]:hi\n[|AI|]:",
    ),
    "wizardcoder": (
        f"«<s>»▁{INSTRUCTION}### Instruction:\nhi\n\n### Response:yes\n### Instruction:\nwhy\n\n### Response:",
        None,
    ),
    "sus-chat": ("▁### Human: hi\n\n### Assistant: yes### Human: why\n\n### Assistant: ", None),
    "deepseek-coder": (
        f"{BEGIN}▁{CODER}### Instruction:\nhi\n### Response:\nyes\n«<|EOT|>»▁\n### Instruction:\nwhy\n### Response:\n",
        f"{BEGIN}▁be brief### Instruction:\nhi\n### Response:\n",
    ),
    "deepseek-v2": (
        f"{BEGIN}▁User: hi\n\nAssistant: yes{STOP}▁User: why\n\nAssistant:",
        f"{BEGIN}▁be brief\n\nUser: hi\n\nAssistant:",
    ),
    "deepseek-v3": (
        f"{BEGIN}«<｜User｜>»▁hi«<｜Assistant｜>»▁yes{STOP}«<｜User｜>»▁why«<｜Assistant｜>»",
        f"{BEGIN}▁be brief«<｜User｜>»▁hi«<｜Assistant｜>»",
    ),
    "internlm": (
        "«<s>»«<s>»▁<|User|>:hi«<eoh>»▁\n<|Bot|>:yes«<eoa>»▁\n<|User|>:why«<eoh>»▁\n<|Bot|>:",
        None,
    ),
    "internlm2": (
        f"«<s>»{IM}▁user\nhi{END}▁\n{IM}▁assistant\nyes{END}▁\n{IM}▁user\nwhy{END}▁\n{IM}▁assistant\n",
        f"«<s>»{IM}▁system\nbe brief{END}▁\n{IM}▁user\nhi{END}▁\n{IM}▁assistant\n",
    ),
    "xverse": ("▁Human: hi\n\nAssistant: yes«3»▁Human: why\n\nAssistant: ", None),
    "baichuan": ("«195»▁hi«196»▁yes«195»▁why«196»", None),
    "baichuan2": ("«195»▁hi«196»▁yes«195»▁why«196»", "▁be brief«195»▁hi«196»"),
    "minicpm": ("«<s>»▁<用户>hi<AI>yes<用户>why<AI>", None),
    "chatglm": (
        "▁[Round 0]\n问：hi\n答：yes\n[Round 1]\n问：why\n答：«[gMASK]»«<sop>»",
        None,
    ),
    "chatglm2": (
        "«[gMASK]»«sop»▁[Round 1]\n\n问：hi\n\n答：yes\n\n[Round 2]\n\n问：why\n\n答：",
        None,
    ),
    "chatglm3": (
        "«[gMASK]»«sop»«<|user|>»▁\n▁hi«<|assistant|>»▁\n▁yes«<|user|>»▁\n▁why«<|assistant|>»",
        f"«[gMASK]»«sop»{SYS}▁\n▁be brief«<|user|>»▁\n▁hi«<|assistant|>»",
    ),
    "glm4": (
        "«[gMASK]»«<sop>»«<|user|>»▁\n▁hi«<|assistant|>»▁\n▁yes«<|user|>»▁\n▁why«<|assistant|>»",
        f"«[gMASK]»«<sop>»{SYS}▁\n▁be brief«<|user|>»▁\n▁hi«<|assistant|>»",
    ),
    "codegeex4": (
        (
            f"«[gMASK]»«<sop>»{SYS}▁\n▁你是一位智能编程助手，你叫CodeGeeX。你会为用户回答关于编程、代码、计算机方面的任何问题，"
            "并提供格式规范、可以执行、准确安全的代码，并在必要时提供详细的解释。"
            "«<|user|>»▁\n▁hi«<|assistant|>»▁\n▁yes«<|user|>»▁\n▁why«<|assistant|>»"
        ),
        f"«[gMASK]»«<sop>»{SYS}▁\n▁be brief«<|user|>»▁\n▁hi«<|assistant|>»",
    ),
    "moss": (
        "MOSS<|Human|>: hi«<eoh>»▁\n<|MOSS|>: yes«<eom>»▁\n<|Human|>: why«<eoh>»▁\n<|MOSS|>:",
        "▁be brief\n<|Human|>: hi«<eoh>»▁\n<|MOSS|>:",
    ),
    "rwkv-raven": ("▁Bob: hi\n\nAlice: yes\n\nBob: why\n\nAlice:", None),
}


def test_every_format_is_written_out_here() -> None:
    assert set(EXPECTED) == set(FORMATS)


@pytest.mark.parametrize("name", EXPECTED)
def test_prompts_of_two_rounds_and_of_one(name: str) -> None:
    ids = spelt(render_chat(named(name), TOKENIZER, TWICE).encode())
    want = EXPECTED[name][0]
    if name == "moss":  # its introduction is as long as all others together
        head = (
            "▁You are an AI assistant whose name is MOSS.\n- MOSS is a conversational language model that is "
        )
        assert ids.startswith(head)
        assert "\n- Web search: disabled. \n- Calculator: disabled.\n" in ids
        ids = "MOSS" + ids[ids.index("<|Human|>") :]
    assert ids == want
    # a conversation goes on where it was: what a replica has in its cache is found again
    once = spelt(render_chat(named(name), TOKENIZER, ASKED).encode())
    if name == "chatglm":  # its first round has no number until there is a second
        assert once == "▁hi«[gMASK]»«<sop>»"
    elif name != "moss":
        assert want.startswith(once)


@pytest.mark.parametrize("name", EXPECTED)
def test_system_messages(name: str) -> None:
    want = EXPECTED[name][1]
    if want is None:
        with pytest.raises(InvalidRequest, match="this prompt format has no place for a system message"):
            render_chat(named(name), TOKENIZER, BRIEF)
    else:
        assert spelt(render_chat(named(name), TOKENIZER, BRIEF).encode()) == want


@pytest.mark.parametrize("name", sorted(set(EXPECTED) - {"chatml", "internlm2", "llama3"}))
def test_turns_are_taken(name: str) -> None:
    for messages, why in (
        ([*ASKED, *ASKED], "user and assistant must take turns, .* message 1 is of user"),
        (TWICE[1:], "message 0 is of assistant"),
        (TWICE[:2], "the last message must be of user"),
        ([*ASKED, TWICE[1], *BRIEF], "message 2 is of system"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            render_chat(named(name), TOKENIZER, messages)
