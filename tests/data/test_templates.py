"""Chat templates are programs of strangers: none runs for ever, fills the memory or ends a run."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxrl_eff.data import template_worker, templates
from jaxrl_eff.data.chat import render_chat
from jaxrl_eff.data.tokenizer import CharTokenizer

pytest.importorskip("jinja2")

TALK = [{"role": "user", "content": "ab"}]
TWICE = "{% set n = namespace(v=START) %}{% for i in range(60) %}{% set n.v = NEXT %}{% endfor %}"


def doubled(start, following, use=""):
    return TWICE.replace("START", start).replace("NEXT", following) + use


# What is asked of the interpreter in one operation, what is asked step by step, and what is only
# big once it is shown.
WITHOUT_END = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long string": "{{ 'a' * 100000000000 }}",
    "a long string of the conversation": "{{ messages[0].content * 100000000000 }}",
    "a long list": "{{ [1] * 100000000000 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a squared number": doubled("99", "n.v * n.v"),
    "a doubled string": doubled("'aa'", "n.v ~ n.v"),
    "a doubled list": doubled("[1]", "n.v + n.v"),
    "a nested list": doubled("[1]", "[n.v, n.v]", "{{ n.v }}"),
    "a nested list as JSON": doubled("[1]", "[n.v, n.v]", "{{ n.v | tojson }}"),
    "a nested dict": doubled("{}", "{'a': n.v, 'b': n.v}", "{{ n.v | string | length }}"),
    "a replacement": doubled("'aa'", "n.v.replace('a', n.v)"),
    "a join": doubled("'aa'", "n.v | join(n.v)"),
    "a width of %": "{{ '%100000000000d' % 1 }}",
    "a width of format": "{{ '{:100000000000}'.format(1) }}",
    "a width of the filter": "{{ '%*d' | format(100000000000, 1) }}",
    "rjust": "{{ 'a'.rjust(100000000000) }}",
    "zfill": "{{ 'a'.zfill(100000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(2000000000) }}",
    "center": "{{ 'a' | center(100000000000) }}",
    "indent": "{{ 'a\nb' | indent(100000000000) }}",
    "JSON's indent": "{{ [1] | tojson(indent=100000000000) }}",
    "batch": "{{ [1] | batch(100000000000, 0) | list }}",
    "slice": "{{ [1] | slice(100000000000) | list }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "bytes": "{{ (1).to_bytes(100000000000, 'big') }}",
    "lipsum": "{{ lipsum(n=1000000000) }}",
    "a macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "many lists": "{{ range(99999) | map('string') | list * 99999 }}",
    "output": "{% for i in range(99999) %}" + "a" * 200 + "{% endfor %}",
}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    monkeypatch.setattr(templates, "CHARACTERS", 10**6)


def refused(template):
    """The message of the refusal."""
    with pytest.raises(ValueError, match="the chat template of CharTokenizer") as error:
        render_chat(CharTokenizer("ab", template), TALK)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


@pytest.mark.parametrize("template", WITHOUT_END.values(), ids=WITHOUT_END)
def test_a_template_without_end_is_refused_within_seconds(short, template):
    began = time.monotonic()
    refused(template)
    assert time.monotonic() - began < 30


def test_the_refusal_says_which_bound_was_met(short):
    loops = WITHOUT_END["loops"]
    assert refused(loops).endswith("does not end within 0.2 s of computing.")
    assert refused("{{ 'a' * 100000000000 }}").endswith("needs more than 1 GiB of memory.")
    assert "writes 1,000,001 characters; at most 1,000,000" in refused("{{ 'a' * 1000001 }}")
    assert len(render_chat(CharTokenizer("ab", "{{ 'a' * 1000000 }}"), TALK)) == 10**6
    assert "calls itself without end" in refused(WITHOUT_END["a macro"])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 // 0 }}", "refused: ZeroDivisionError"),
        ("{{ messages[7].role }}", "refused: .* has no element 7"),
        ("{{ [1, 'a'] | sort }}", "refused: TypeError"),
        ("{{ 'x'.encode('nonsense') }}", "refused: LookupError: unknown encoding"),
        ("{{ messages.append(1) }}", "refused: .* unsafe"),
        ("{% include 'x' %}", "refused: "),
        ("{{ x | nofilter }}", "is not Jinja: No filter named 'nofilter'"),
        ("{% for %}", "is not Jinja: "),
        ("{{ raise_exception('a\nb' * 999) }}", r"refused: a ba .* \.\.\.$"),
        ("{{ messages | tojson(indent=nothing) }}", "refused: 'nothing' is undefined"),
    ],
)
def test_every_error_of_a_template_is_one_line_with_its_origin(template, message):
    with pytest.raises(ValueError, match=message):
        render_chat(CharTokenizer("ab", template), TALK)
    refused(template)


def test_after_a_refusal_other_templates_are_rendered(short):
    refused(WITHOUT_END["loops"])
    assert render_chat(CharTokenizer("ab", "{{ messages[0].content }}"), TALK) == "ab"


def test_threads_may_render_at_the_same_time():
    said, out = CharTokenizer("ab", "{{ messages[0].content }}"), {}

    def body(n):
        for i in range(20):
            text = "ab"[n % 2] * (i + n)
            out[n, i] = render_chat(said, [{"role": "user", "content": text}]) == text

    threads = [threading.Thread(target=body, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(out) == 80 and all(out.values())


def test_a_killed_worker_is_replaced():
    said = CharTokenizer("ab", "{{ messages[0].content }}")
    assert render_chat(said, TALK) == "ab"
    process = templates._renderer.process
    os.kill(process.pid, signal.SIGTERM)
    process.wait()
    assert render_chat(said, TALK) == "ab"
    assert templates._renderer.process.pid != process.pid


def test_the_worker_ends_with_the_process_that_started_it():
    code = """
import os, signal
from jaxrl_eff.data import templates
print(templates.render("{{ 1 }}", "here", [([], False)], special={}))
print(templates._renderer.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    text, pid = done.stdout.split("\n")[:2]
    assert text == "['1']"
    for _ in range(100):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return
        if "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
            return  # ended; nobody has asked how yet
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


def test_what_is_no_plain_value_is_refused_before_it_is_sent():
    with pytest.raises(ValueError, match="no plain value"):
        render_chat(
            CharTokenizer("ab", "{{ 1 }}"), [{"role": "user", "content": "a", "f": lambda: 0}]
        )


def test_text_of_any_kind_comes_back_as_it_was():
    text = 'é😀\u2028"\\\x00\r\n'
    said = CharTokenizer("ab", "{{ messages[0].content }}")
    assert render_chat(said, [{"role": "user", "content": text}]) == text


def test_a_request_is_answered_with_texts_in_their_order():
    arguments = ("{{ messages | length }}{{ add_generation_prompt }}", ("", ""))
    wanted = [([{}] * n, n == 2) for n in range(3)]
    kind, text = template_worker.answer(*arguments, wanted, {}, 100)
    assert (kind, text) == (template_worker.TEXT, '["0False", "1False", "2True"]')
    assert template_worker.answer(*arguments, wanted, {}, 5) == (template_worker.OUTPUT, "6")
    assert pickle.loads(pickle.dumps(wanted)) == wanted
