"""Messages for people: nothing in them acts on a terminal, and none is endless."""

from __future__ import annotations

import unicodedata

from moe_edge.models.errors import MAX_SENTENCE, printable, sentence


def test_every_control_character_is_shown_as_an_escape() -> None:
    for code in range(0x11000):
        character = chr(code)
        shown = printable(character)
        acts = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        acts |= unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        acts |= character in "\u061c\u200e\u200f"
        assert (shown != character) == acts, hex(code)
        assert shown.isprintable() or not acts


def test_escapes_are_the_ones_people_know() -> None:
    assert printable("a\x1b[31m\n\t\r\x00\x7f\x9b\u202e") == r"a\x1b[31m\n\t\r\x00\x7f\x9b\u202e"
    assert printable(b"caf\xe9.gguf".decode(errors="surrogateescape")) == r"caf\xe9.gguf"
    assert printable("\ud800") == r"\ud800"
    assert printable("a\nb\tc\x1b", keep="\n\t") == "a\nb\tc\\x1b"
    assert printable("größer 你好 😀 שלום") == "größer 你好 😀 שלום"


def test_a_long_message_keeps_its_beginning_and_its_way_out() -> None:
    said = sentence("model.gguf: tensor '" + "x" * 100_000 + "' is too long; convert it anew")
    assert said.startswith("model.gguf: tensor 'xxx") and said.endswith("; convert it anew")
    assert len(said) < MAX_SENTENCE + 100 and "characters left out" in said
    assert sentence("short") == "short"
