"""Small chat templates of the well-known families, and the tokens that each needs; made for the tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tiny import CHATML, tiny_tokenizer_folder

from tunesmith.data.codec import Codec

LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = """
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for m in turns -%}
  {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('turns must alternate') }}{%- endif -%}
  {%- set text = system + m['content'] if loop.first else m['content'] -%}
  {%- if m['role'] == 'user' -%}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
  {%- else -%}{{ ' ' + text.strip() + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
QWEN3 = """
{%- set ns = namespace(last=messages | length) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- set content = m.content -%}
  {%- if m.role == 'assistant' -%}
    {%- set thought = '' -%}
    {%- if '</think>' in content -%}
      {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {%- if loop.index0 > ns.last and (loop.last or thought) -%}
      {%- set content = '<think>\n' + thought + '\n</think>\n\n' + content -%}
    {%- endif -%}
  {%- endif -%}
  {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{{ '\n' }}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """A template with its tokens; `lead` is what the model writes between prompt and answer, if anything."""

    template: str
    special: tuple[str, ...]
    end: str
    bos: str | None = None
    eos: str = ""
    structural: tuple[str, ...] = ()
    lead: str = ""
    tail: str = ""
    words: str | None = None

    def folder(self, path: Path) -> Path:
        return tiny_tokenizer_folder(
            path,
            template=self.template,
            special=self.special,
            structural=self.structural,
            bos=self.bos,
            eos=self.eos or self.end,
            words=self.words,
        )

    def codec(self, path: Path) -> Codec:
        return Codec.open(self.folder(path))


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# a run of line ends is one word, whatever follows: else the header's two would be cut apart by the answer behind them
_LINES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
FAMILIES = {
    "chatml": Family(CHATML, _CHATML, "<|im_end|>"),
    "smollm2": Family(CHATML, _CHATML, "<|im_end|>", bos="<|im_start|>"),
    "llama3": Family(LLAMA3, _LLAMA3, "<|eot_id|>", bos="<|begin_of_text|>", eos="<|end_of_text|>", words=_LINES),
    "llama2": Family(LLAMA2, ("<unk>", "<s>", "</s>"), "</s>", bos="<s>", lead=" ", tail=" "),
    "gemma": Family(
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        bos="<bos>",
        eos="<eos>",
    ),
    "mistral": Family(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", bos="<s>"),
    "qwen3": Family(QWEN3, _CHATML, "<|im_end|>", structural=("<think>", "</think>"), lead="<think>\n\n</think>\n\n"),
    "zephyr": Family(ZEPHYR, ("<s>", "</s>"), "</s>", bos="<s>"),
    "tagged": Family(TAGGED, _CHATML, "<|im_end|>"),
}
