"""Templates for models whose file has none, by architecture; ChatML for whatever else there is."""

from typing import Final, NamedTuple


class DefaultTemplate(NamedTuple):
    """A template, and the text that ends a turn in it: the model's vocabulary may have no token for it."""

    text: str
    stops: tuple[str, ...]


_CHATML: Final = DefaultTemplate(
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ("<|im_end|>",),
)
_GEMMA: Final = DefaultTemplate(
    "{{ bos_token }}{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' + message['content'] "
    "+ '<end_of_turn>\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ("<end_of_turn>",),
)
_PHI3: Final = DefaultTemplate(
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    ("<|end|>",),
)
_BY_ARCHITECTURE: Final = {"gemma": _GEMMA, "gemma2": _GEMMA, "gemma3": _GEMMA, "phi3": _PHI3}


def default_template(architecture: str) -> DefaultTemplate:
    """The template that models of this architecture were most likely trained with."""
    return _BY_ARCHITECTURE.get(architecture, _CHATML)
