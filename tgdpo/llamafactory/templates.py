"""Chat templates of LLaMA-Factory, which has its own under names, as Jinja: a tokenizer's own may differ from them."""

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class _Turns:
    """Text around the messages of a conversation, as the reference code has it.

    Attributes:
        begin: Before everything.
        system: Around a system message, which may only come first.
        user: Around a user's message.
        answer: Before an assistant's message.
        end: Behind an assistant's message.
        last: Behind the last one, instead.
        between: Before every user's message but the first.
        default_system: The system message of a conversation that has none.
    """

    system: tuple[str, str]
    user: tuple[str, str]
    answer: str
    end: str
    last: str
    begin: str = ""
    between: str = ""
    default_system: str = ""


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


_BOS, _EOS = "{{ bos_token }}", "{{ eos_token }}"
_CHATML = _Turns(
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    answer="<|im_start|>assistant\n",
    end="<|im_end|>",
    last="<|im_end|>",
    between="\n",
)
# Read in src/llamafactory/data/template.py of the authors' code.
_TEMPLATES = {
    "llama3": _Turns(
        begin=_BOS,
        system=(_header("system"), "<|eot_id|>"),
        user=(_header("user"), "<|eot_id|>"),
        answer=_header("assistant"),
        end="<|eot_id|>",
        last="<|eot_id|>",
    ),
    "chatml": _CHATML,
    "qwen": _Turns(**{**vars(_CHATML), "default_system": "You are a helpful assistant."}),
    "gemma": _Turns(
        begin=_BOS,
        system=("", ""),
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        answer="<start_of_turn>model\n",
        end="",
        last=_EOS,
        between="<end_of_turn>\n",
    ),
}
NAMES = tuple(_TEMPLATES)


def chat_template(name: str) -> str:
    """The Jinja source of one of :data:`NAMES`: one line, so that nothing depends on how white space is trimmed."""
    turns = _TEMPLATES[name]
    system = _text(turns.system[0]) + "{{ SYSTEM }}" + _text(turns.system[1])
    default = ""
    if turns.default_system:
        words = system.replace("{{ SYSTEM }}", _text(turns.default_system))
        default = "{% if messages[0].role != 'system' %}" + words + "{% endif %}"
    return (
        f"{_text(turns.begin)}{default}{{% set seen = namespace(user=false) %}}{{% for message in messages %}}"
        f"{{% if message.role == 'system' and loop.first %}}{system.replace('SYSTEM', 'message.content')}"
        f"{{% elif message.role == 'user' %}}{{% if seen.user %}}{_text(turns.between)}{{% endif %}}"
        f"{{% set seen.user = true %}}{_text(turns.user[0])}{{{{ message.content }}}}{_text(turns.user[1])}"
        f"{{% elif message.role == 'assistant' %}}{_text(turns.answer)}{{{{ message.content }}}}"
        f"{{% if loop.last %}}{_text(turns.last)}{{% else %}}{_text(turns.end)}{{% endif %}}"
        "{% else %}{{ raise_exception('only system (first), user and assistant messages are known') }}{% endif %}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{_text(turns.answer)}{{% endif %}}\n"
    )


def _text(text: str) -> str:
    """Jinja that writes a text; what is Jinja already stays."""
    return text if text in ("", _BOS, _EOS) else f"{{{{ {json.dumps(text)} }}}}"
