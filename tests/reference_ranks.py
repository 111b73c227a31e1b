"""What llama.cpp's own converter makes of a ranks file, as JSON: reference_ranks.py FOLDER CLASS PRE LLAMA_CPP.

Run by the interpreter of build/reference. The converter asks the model's Python code for ranks and special tokens; a
stand-in gives it those of the folder, so that no such code is needed.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any


class StandIn:
    """The parts of the tokenizers of Kimi-K2 and HunYuan that the converter uses."""

    def __init__(self, folder: Path, pre: str) -> None:
        config = json.loads((folder / "config.json").read_text())
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (path,) = [*folder.glob("*.tiktoken"), *folder.glob("tiktoken.model")]
        pairs = (line.split() for line in path.read_bytes().splitlines())
        self.mergeable_ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        n, self.vocab_size = len(self.mergeable_ranks), config["vocab_size"]
        named = {int(i): each["content"] for i, each in settings.get("added_tokens_decoder", {}).items()}
        if pre == "kimi-k2":
            self.special_tokens = {named.get(i, f"<|reserved_token_{i}|>"): i for i in range(n, self.vocab_size)}
        else:
            names = ["<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"]
            names += [f"<|extra_{i}|>" for i in range(self.vocab_size - n - len(names))]
            self.special_tokens = {name: n + i for i, name in enumerate(names)}
        self.model, self._mergeable_ranks = self, self.mergeable_ranks


class Written(dict[str, Any]):
    """Takes what a GGUF writer would write, by the name of its method: the last call counts."""

    def __getattr__(self, name: str) -> Any:
        return lambda value, *_: self.update({name: value})


def main(folder: Path, kind_name: str, pre: str, llama_cpp: Path) -> None:
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import transformers  # type: ignore[import-not-found,unused-ignore]
    from conversion import get_model_class  # type: ignore[import-not-found,unused-ignore]

    stand_in = StandIn(folder, pre)
    transformers.AutoTokenizer = type("AutoTokenizer", (), {"from_pretrained": lambda *_, **__: stand_in})
    kind = get_model_class(kind_name)
    converter = object.__new__(kind)
    converter.dir_model, converter.gguf_writer = folder, Written()
    converter.hparams = json.loads((folder / "config.json").read_text())
    converter.get_vocab_base_pre = lambda _: pre
    converter.set_vocab()
    json.dump(converter.gguf_writer, sys.stdout, default=int)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
