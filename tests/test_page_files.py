"""The page's files: all there, nothing from elsewhere, and headers that keep a browser inside. Without a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

import pytest
from moe_edge.runner.fake import FakeModel
from moe_edge.runner.serve.browser_page import PAGE
from serving import Server, serving

OURS = sorted(path for path in PAGE.rglob("*") if path.is_file())
IMPORT = re.compile(r"""(?:^import\s[^"']*|\bfrom\s+|^\s*export\s[^"']*from\s+)["']([^"']+)["']""", re.M)
ADDRESS = re.compile(r"\b(?:https?|wss?|ftp)://[^\s\"'`)]+|[\"'(]//[a-z]")
BY_NAME = re.compile(r"""byId\(["']([\w-]+)["']\)""")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(FakeModel(), api_key="secret") as running:
        yield running


class Tags(HTMLParser):
    """The attributes of every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def values(self, name: str) -> list[str]:
        return [value for _, attributes in self.found if (value := attributes.get(name)) is not None]


INDEX = Tags((PAGE / "index.html").read_text())


def test_every_file_that_the_page_names_is_served_without_a_key(server: Server) -> None:
    named = [each for name in ("src", "href") for each in INDEX.values(name) if not each.startswith("#")]
    assert len(named) >= 6
    for address in named:
        answer = server.get(address)
        assert answer.status_code == 200 and answer.content, address


def test_every_module_that_is_imported_is_there() -> None:
    n = 0
    for path in PAGE.rglob("*.js"):
        for name in IMPORT.findall(path.read_text()):
            assert name.startswith("./"), f"{path.name} imports {name}"
            assert (path.parent / PurePosixPath(name)).is_file(), f"{path.name} imports {name}"
            n += 1
    assert n > 20


def test_every_other_name_of_a_language_is_one_that_can_be_coloured() -> None:
    text = (PAGE / "highlight.js").read_text()
    words, aliases = (re.search(rf"const {name} = \{{(.*?)\n\}}", text, re.S) for name in ("WORDS", "ALIASES"))
    assert words and aliases
    names = set(re.findall(r"^  (\w+):", words[1], re.M)) | {"diff", "ini", "xml"}
    assert len(names) > 12 and set(re.findall(r': "(\w+)"', aliases[1])) <= names


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_no_file_of_ours_names_an_address_elsewhere(path: Path) -> None:
    allowed = {"http://www.w3.org/2000/svg"}  # a name, which is never asked
    assert set(ADDRESS.findall(path.read_text())) <= allowed
    assert path.stat().st_size < 100_000 and len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", [path for path in OURS if path.suffix == ".js"], ids=lambda path: path.name)
def test_no_script_of_ours_makes_markup_or_code_from_text(path: Path) -> None:
    text = path.read_text()
    forbidden = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "DOMParser")
    assert [word for word in forbidden if word in text] == []


def test_every_node_that_a_script_asks_for_by_name_is_in_the_page() -> None:
    ids = INDEX.values("id")
    assert len(ids) == len(set(ids))
    for path in PAGE.glob("*.js"):
        assert set(BY_NAME.findall(path.read_text())) <= set(ids), path.name


def test_nothing_in_the_page_is_a_script_or_a_style_of_its_own() -> None:
    for tag, attributes in INDEX.found:
        assert tag != "style" and "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "script" or attributes.get("src")


def test_what_a_tool_for_the_blind_needs_is_there() -> None:
    for tag, attributes in INDEX.found:
        if tag in ("aside", "nav", "dialog", "section", "canvas"):
            assert {"aria-label", "aria-labelledby", "aria-hidden"} & set(attributes), (tag, attributes)
        for name in ("aria-labelledby", "aria-controls"):
            assert attributes.get(name) in (None, *INDEX.values("id"))
    assert dict(INDEX.found)["html"]["lang"] == "en"


def test_the_page_and_its_files_carry_a_policy_that_lets_nothing_else_in(server: Server) -> None:
    for path, headers in (("/", {"Accept": "text/html"}), ("/page/main.js", {}), ("/page/lexer.js", {})):
        answer = server.get(path, headers=headers)
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy.pop("default-src") == "'none'"
        assert policy.pop("require-trusted-types-for") == "'script'" and policy.pop("trusted-types") == "'none'"
        assert set(policy.values()) <= {"'self'", "'none'"} and policy["connect-src"] == "'self'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert server.get("/page/main.js").headers["content-type"].startswith(("text/javascript", "application/javascript"))
    assert server.get("/page/style.css").headers["content-type"].startswith("text/css")
