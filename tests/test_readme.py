"""What the README and docs/ show is what the code does. `make docs` rewrites what is generated."""

import importlib.util
import re
from pathlib import Path

import pytest

import jaxrl_eff
from jaxrl_eff.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
SHOWN = {"ppo-figure": ROOT / "README.md", "ppo-table": ROOT / "docs" / "algorithms.md"}
FILES = {
    "main": "main.py",
    **{word: f"cli/{word}.py" for word in COMMANDS},
}


def ppo_graph():
    """PPO as its config's defaults make it, for a model of any shape."""
    from jaxrl_eff.algorithms import Rollout, ppo
    from jaxrl_eff.models import LMConfig
    from jaxrl_eff.rollout import Sampling

    sizes = {"layers": 1, "width": 8, "heads": 1, "kv_heads": 1, "head_dim": 8, "ffn": 8}
    lm = LMConfig(vocab=16, **sizes)
    value = LMConfig(vocab=16, **sizes, head="value")
    sampling = Sampling(max_tokens=8)
    models = {"actor": lm, "critic": value, "reward": value}
    return ppo.graph(ppo.PPOConfig(), models, Rollout(sampling))


def table(graph) -> str:
    """The calls as a Markdown table, in the order in which they run."""
    from jaxrl_eff import core

    lines = ["| call | kind | model | reads | writes |", "|---|---|---|---|---|"]
    for c in core.order(graph):
        names = f"`{c.name}` | {c.kind} | {c.of or ''}"
        lines.append(f"| {names} | {' '.join(c.reads)} | {' '.join(c.writes)} |")
    return "\n".join(lines)


def figure(graph) -> str:
    """The graph as a Mermaid block."""
    from jaxrl_eff import core

    return f"```mermaid\n{core.draw(graph)}\n```"


def between(text: str, mark: str) -> str:
    """What stands between `<!-- MARK -->` and `<!-- /MARK -->`."""
    return re.search(rf"<!-- {mark} -->\n(.*?)\n?<!-- /{mark} -->", text, re.DOTALL)[1]


def generator():
    """The module docs/generate.py."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands() -> list[str]:
    """The commands in blocks of the README and the docs, one a line, without comments."""
    texts = [path.read_text() for path in (ROOT / "README.md", *PAGES)]
    blocks = [b for t in texts for b in re.findall(r"```(?:sh|bash)\n(.*?)```", t, re.DOTALL)]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]


def headings(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in found}


def test_table_and_figure_are_current():
    graph = ppo_graph()
    for mark, wanted in (("ppo-table", table(graph)), ("ppo-figure", figure(graph))):
        assert between(SHOWN[mark].read_text(), mark) == wanted, "run `make docs`"


def test_generated_pages_are_current():
    made = generator()
    assert (ROOT / "docs" / "config.md").read_text() == made.config_page(), "run `make docs`"
    pairs = (ROOT / "docs" / "combinations.md").read_text()
    assert pairs == made.combinations_page(), "run `make docs`"
    for room in made.ROOMS:
        text = (ROOT / "docs" / f"{room}.md").read_text()
        assert text == made.room_page(text, room), f"docs/{room}.md: run `make docs`"


def test_every_room_and_package_in_it_has_a_page():
    made = generator()
    opened = [getattr(jaxrl_eff, name) for name in jaxrl_eff.__all__]
    packages = {p.__name__.removeprefix("jaxrl_eff.") for p in opened if hasattr(p, "__path__")}
    assert packages == {name for names in made.ROOMS.values() for name in names} - {"cli"}
    rooms = {path.parent.name for path in (ROOT / "jaxrl_eff").glob("*/__init__.py")}
    assert rooms == {*made.ROOMS}


def test_the_readme_shows_the_end_of_the_whole_output():
    end = between((ROOT / "README.md").read_text(), "quickstart-output").removeprefix("```text\n")
    assert between((ROOT / "docs" / "train.md").read_text(), "quickstart-output").endswith(end)


@pytest.mark.parametrize("document", [*TEXTS, ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_resolve(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            path = (document.parent / name).resolve() if name else document
            assert path.exists(), f"{document.name} links to {target}"
            assert not anchor or anchor in headings(path), f"{document.name} links to {target}"


def test_paths_in_backticks_exist():
    """Names of files and folders of this repository, such as `jaxrl_eff/train/loop.py`."""
    for document in TEXTS:
        tops = r"(?:jaxrl_eff|configs|tests|colab|docs|experiments|\.ci)"
        for path in re.findall(rf"`({tops}/[\w./-]*)`", document.read_text()):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for document in TEXTS:
        for target in re.findall(r"(?m)(?:^|`)make ([a-z-]+)", document.read_text()):
            assert target in targets, f"{document.name} says make {target}"


def test_programs_and_flags_exist():
    sources = {m: (ROOT / "jaxrl_eff" / path).read_text() for m, path in FILES.items()}
    seen = set()
    for line in commands():
        for module in re.findall(r"-m jaxrl_eff[. ](\w+)", line):
            assert module in FILES, f"{line!r} runs {module}"
            seen.add(module)
            flags = re.findall(r"--([a-z_]+)", re.split(rf"jaxrl_eff[. ]{module}", line)[1])
            for flag in flags:
                pattern = rf'"--{flag}"|DEFINE_\w+\(\s*"{flag}"'
                found = re.search(pattern, sources[module])
                assert found, f"{line!r}: {module} has no flag --{flag}"
    assert seen == set(FILES)


def test_configs_take_the_arguments_and_have_the_fields(monkeypatch):
    from jaxrl_eff.train import config_file, settings

    monkeypatch.chdir(ROOT)
    seen = 0
    for line in commands():
        for config in re.findall(r"--config=(\S+)", line):
            changes = re.findall(r"--config\.(\S+=\S+)", line)
            assert settings.run(config_file.load(config, changes)).stages, line
            seen += 1
    assert seen >= 3


def rewrite() -> None:
    """Puts the current table, figure and generated pages into the README and the docs."""
    graph = ppo_graph()
    for mark, wanted in (("ppo-table", table(graph)), ("ppo-figure", figure(graph))):
        block = f"<!-- {mark} -->\n{wanted}\n<!-- /{mark} -->"
        text = SHOWN[mark].read_text()
        pattern = rf"<!-- {mark} -->.*?<!-- /{mark} -->"
        SHOWN[mark].write_text(re.sub(pattern, lambda _, b=block: b, text, flags=re.DOTALL))
    generator().main()


if __name__ == "__main__":
    rewrite()
