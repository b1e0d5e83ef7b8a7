"""Chat templates: what is rendered, and which tokens the assistant said."""

import json

import pytest
from test_tokenizer import save_bytes_tokenizer

from jaxrl_eff.data import source_files
from jaxrl_eff.data.chat import encode_chat, render_chat, to_answer
from jaxrl_eff.data.encode import encode_chat_prompt, encode_messages
from jaxrl_eff.data.tokenizer import CharTokenizer, load_tokenizer

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As above, with the assistant's words marked.
MARKED = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>' + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Shows thoughts only in the last turn.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi 😀"},
    {"role": "assistant", "content": "hello é"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "bye"},
]


@pytest.fixture
def tokenizer_of(tmp_path):
    def make(template, **more):
        save_bytes_tokenizer(tmp_path, chat_template=template, **more)
        return load_tokenizer(tmp_path)

    return make


def said(tok, ids, mask) -> str:
    return tok.decode([i for i, m in zip(ids, mask, strict=True) if m], special=True)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_mask_is_what_the_assistant_said(tokenizer_of, template):
    tok = tokenizer_of(template)
    ids, mask = encode_chat(tok, TALK)
    assert said(tok, ids, mask) == "hello é<|im_end|>bye<|im_end|>"
    assert tok.decode(ids, special=True) == render_chat(tok, TALK)
    assert render_chat(tok, TALK).endswith("assistant\nbye<|im_end|>\n")
    ids, mask = encode_chat(tok, TALK[:2], add_generation_prompt=True)
    assert sum(mask) == 0
    assert tok.decode(ids, special=True).endswith("<|im_start|>assistant\n")


def test_both_ways_of_masking_agree(tokenizer_of):
    plain = encode_chat(tokenizer_of(CHATML), TALK)
    assert encode_chat(tokenizer_of(MARKED), TALK) == plain


def test_a_template_that_rewrites_the_past_is_refused_by_turn(tokenizer_of):
    tok = tokenizer_of(FORGETFUL)
    think = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "hm</think>b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    ids, mask = encode_chat(tok, think[:2])
    assert said(tok, ids, mask) == "hm</think>b<|im_end|>"
    with pytest.raises(ValueError, match=r"turn 1 \(assistant\)"):
        encode_chat(tok, think)
    assert "hm" not in render_chat(tok, think)


def test_blanks_that_the_assistant_said_stay(tokenizer_of):
    tok = tokenizer_of("{% for m in messages %}{{ m.content }}{% endfor %}")
    ids, mask = encode_chat(
        tok, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b \n"}]
    )
    assert said(tok, ids, mask) == "b \n"


def test_templates_may_use_what_transformers_gives(tokenizer_of):
    tok = tokenizer_of(
        "{{ {'b': '<é>'} | tojson }}|{{ strftime_now('%Y') | length }}|"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}|"
        "{{ bos_token }}{{ eos_token }}\n"
        "   {% if true %}\nx{% endif %}"
    )
    assert render_chat(tok, TALK[:2]) == '{"b": "<é>"}|4|01|<|im_end|>\nx'


def test_templates_run_in_a_sandbox(tokenizer_of):
    tok = tokenizer_of("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="unsafe"):
        render_chat(tok, TALK)
    tok = tokenizer_of("{{ messages.append(1) }}")
    with pytest.raises(ValueError, match="unsafe"):
        render_chat(tok, TALK)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (CHATML, [{"role": "robot", "content": "x"}], "turn 0: unknown role 'robot'"),
        (CHATML, [TALK[1], {"role": "assistant"}], "turn 1 .* content=None"),
        (CHATML, [{"role": "user", "content": 3}], "content=3"),
        (CHATML, [{"role": "user", "content": "\ufdd0"}], "noncharacter"),
        ("{{ raise_exception('no system') }}", TALK, "refused: no system"),
        ("{% if %}", TALK, "not Jinja"),
        ("{{ messages[0].content + 1 }}", TALK, "refused"),
        (None, TALK, "has no chat template"),
    ],
)
def test_refusals_say_what_is_wrong(tokenizer_of, template, messages, message):
    tok = tokenizer_of(template)
    with pytest.raises(ValueError, match=message):
        render_chat(tok, messages)


def test_a_missing_template_names_the_directory(tokenizer_of, tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        encode_chat(tokenizer_of(None), TALK)


def test_templates_are_found_in_every_form(tokenizer_of, tmp_path):
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    assert render_chat(tokenizer_of(named), TALK) == "d"
    with pytest.raises(ValueError, match="rag"):
        tokenizer_of(named[:1])
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "j"}))
    assert render_chat(tokenizer_of(None), TALK) == "j"
    (tmp_path / "chat_template.jinja").write_text("own")
    assert render_chat(tokenizer_of("s"), TALK) == "own"


def test_a_character_tokenizer_can_chat():
    toy = CharTokenizer("abc", "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    assert encode_chat(toy, talk) == ([3, 4, 2, 5, 2], [0, 0, 0, 1, 1])


def test_parquet_and_json_lines_give_the_same_tokens(tmp_path):
    """Parquet fills the union of all keys with None, at every depth."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    template = (
        "{% for m in messages %}<{{ m.role }}{% if 'name' in m %} {{ m.name }}{% endif %}>"
        "{% if m['content'] is none %}-{% else %}{{ m['content'] }}{% endif %}"
        "{% if 'tool_calls' in m %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}"
        "{% endfor %}"
    )

    def call(name, **arguments):
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    talks = [
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [call("f", city="x")]},
            {"role": "tool", "content": "3", "name": "f"},
            {"role": "assistant", "content": "b"},
        ],
        [
            {"role": "user", "content": "c"},
            {"role": "assistant", "tool_calls": [call("g", n=1), call("h", city=None, n=2)]},
        ],
    ]
    rows = [{"messages": talk} for talk in talks]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    save_bytes_tokenizer(tmp_path, chat_template=template)
    encode = encode_messages(load_tokenizer(tmp_path))
    for i in range(2):
        a, b = (
            encode(source_files.file(tmp_path / f"x.{kind}")[i]) for kind in ("jsonl", "parquet")
        )
        assert a[0].tolist() == b[0].tolist() and a[1].tolist() == b[1].tolist()
    whole = [render_chat(load_tokenizer(tmp_path), talk) for talk in talks]
    assert '"arguments": {"city": "x"}}' in whole[0] and "null" not in whole[0] + whole[1]
    assert "<assistant>-[" in whole[0] and "<assistant>-[" in whole[1]
    assert whole[0].count("[") == 1


U, A, S, T = (
    {"role": role, "content": role[0]} for role in ("user", "assistant", "system", "tool")
)


@pytest.mark.parametrize(
    ("talk", "left"),
    [
        ([U], [U]),
        ([U, A], [U]),
        ([S, U, A], [S, U]),
        ([U, A, U], [U, A, U]),
        ([U, A, U, A], [U, A, U]),
        ([U, A, A], [U]),  # an answer in two turns
        ([U, A, T], [U, A, T]),  # what a tool found is to be answered
        ([U, A, T, A], [U, A, T]),
        ([U, A, S], [U]),  # nobody asks after the answer
        ([U, S], [U, S]),
        ([U, S, A], [U, S]),
        ([S, A], [S]),
        ([A, U, A], [A, U]),
        ([S], [S]),
    ],
    ids=lambda talk: "".join(m["content"] for m in talk),
)
def test_a_prompt_ends_before_the_last_answer(talk, left):
    assert to_answer(talk) == left
    tokenizer = CharTokenizer("uast>", "{% for m in messages %}{{ m.content }}{% endfor %}>")
    ids = encode_chat_prompt(tokenizer)({"messages": talk})
    assert tokenizer.decode(ids.tolist()) == "".join(m["content"] for m in left) + ">"


@pytest.mark.parametrize("talk", [[], [A], [A, A], [A, S]])
def test_a_conversation_without_anything_to_answer_is_refused(talk):
    with pytest.raises(ValueError, match="nothing to answer"):
        to_answer(talk)


def test_a_prompt_may_follow_turns_that_the_template_rewrites(tokenizer_of):
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "hm</think>b"},
        {"role": "user", "content": "c"},
    ]
    tok = tokenizer_of(FORGETFUL)
    text = tok.decode(encode_chat_prompt(tok)({"messages": talk}).tolist(), special=True)
    assert text == "<user>a<|im_end|><assistant>b<|im_end|><user>c<|im_end|><assistant>"
