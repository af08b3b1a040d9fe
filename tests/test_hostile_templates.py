"""A chat template is a program from the bundle: it ends, in bounded time and memory, and reaches nothing of Python."""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rewardrt.errors import BundleError, RewardRTError, RowError
from rewardrt.text.rendering import ChatTemplate
from rewardrt.text.template_limits import LimitedEnvironment

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
HOSTILE: dict[str, str] = {
    # Time.
    "loops in loops": LOOPS + "{% endfor %}{% endfor %}{% endfor %}",
    "loops in loops that print": LOOPS + "x{% endfor %}{% endfor %}{% endfor %}",
    "loops whose turns are left out": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(200) }}",
    "a macro that calls itself for ever": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a loop that calls itself": "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "filters over a range, in a loop": "{% for a in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    "a chain of lazy filters": "{% for a in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
    "searching a long text, in a loop": "{% set t = 'ab' * 5000000 %}{% for a in range(99999) %}{% for b in range(99999) %}{% if 'ba!' in t %}{% endif %}{% endfor %}{% endfor %}",
    "counting in a long text, in a loop": "{% set t = 'ab' * 5000000 %}{% for a in range(99999) %}{% set x = t.count('ba!') %}{% endfor %}",
    "lorem ipsum": "{{ lipsum(n=10 ** 9) }}",
    "lorem ipsum of long paragraphs": "{{ lipsum(1, false, 10 ** 8, 10 ** 8 + 1) }}",
    "many slices": "{{ [1] | slice(10 ** 10) | list | length }}",
    # Memory.
    "a long string": "{{ 'x' * 10 ** 10 }}",
    "a long string, the number first": "{{ 10 ** 10 * 'x' }}",
    "a long list": "{{ [1] * 10 ** 10 }}",
    "a long list of long strings": "{% set a = ['x' * 10000000] * 10000000 %}{{ a }}",
    "a wide text": "{{ 'x' | center(10 ** 9) }}",
    "a constant wide text": "{{ 'x' | center(1000000000) }}",
    "a wide text by a method": "{{ 'x'.ljust(10 ** 10) }}",
    "zeros": "{{ 'x'.zfill(10 ** 10) }}",
    "tabs": "{{ ('\t' * 100000).expandtabs(99999) }}",
    "a wide field": "{{ '%9999999999d' % 1 }}",
    "a wide field by a value": "{{ '%*d' % (10 ** 10, 1) }}",
    "a wide field by the filter": "{{ '%9999999999d' | format(1) }}",
    "a wide field by format": "{{ '{:9999999999}'.format(1) }}",
    "a wide field by format and a value": "{{ '{:{}}'.format(1, 10 ** 10) }}",
    "a wide field by format_map": "{{ '{a:9999999999}'.format_map({'a': 1}) }}",
    "a precise field": "{{ '%.9999999999f' % 1.0 }}",
    "a text that is replaced": "{% set a = 'x' * 100000 %}{{ a.replace('x', a) }}",
    "a text that is replaced everywhere": "{% set a = 'x' * 100000 %}{{ a | replace('', a) }}",
    "a text that is joined": "{% set a = 'x' * 100000 %}{{ a.join(a) }}",
    "a list that is joined": "{% set a = 'x' * 100000 %}{{ range(99999) | join(a) }}",
    "a mapped list that is joined": "{{ range(99999) | map('string') | map('center', 99999) | join }}",
    "a text that is wrapped": "{% set a = 'x' * 100000 %}{{ a | wordwrap(1, true, a) }}",
    "a text that is indented": "{{ ('\n' * 1000000) | indent(99999) }}",
    "an indented list": "{{ [[[1] * 1000] * 100] | tojson(indent=10 ** 9) }}",
    "a batch": "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "a large number": "{{ 9 ** (9 ** 9) }}",
    "a number that is squared": "{% set n = namespace(x=9) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a number that is rounded": "{{ 1.5 | round(10 ** 9, 'floor') }}",
    "a text that doubles": "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a text that doubles by +": "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a text that doubles by %": "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}",
    "a text that doubles by format": "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = '{0}{0}'.format(n.x) %}{% endfor %}",
    "a text that doubles in a block": "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set x %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = x %}{% endfor %}",
    "a text that doubles in a macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = f(n.x) %}{% endfor %}",
    "a list that doubles": "{% set n = namespace(x=[1]) %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a list that holds itself twice": "{% set n = namespace(x=[1]) %}{% for a in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "a tuple that holds itself twice": "{% set n = namespace(x=(1, 2)) %}{% for a in range(99) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x }}",
    "an object that holds itself twice": "{% set n = namespace(x=1) %}{% for a in range(99) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x | tojson }}",
    "an object of dict() that holds itself twice": "{% set n = namespace(x=1) %}{% for a in range(99) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    "much text": "{% set a = 'x' * 10000000 %}{% for b in range(999) %}{{ a }}{% endfor %}",
    # Python's own things.
    "attributes of a string": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attributes by a filter": "{{ ('' | attr('__class__')).__mro__ }}",
    "attributes by format": "{{ '{0.__class__.__mro__}'.format('') }}{{ raise_exception('not empty') if '{0.__class__}'.format('') else '' }}",
    "globals of a function": "{{ raise_exception.__globals__['sys'].exit() }}",
    "globals of the cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "attributes of a namespace": "{{ namespace(__class__=1) }}",
    "the template itself": "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.environment.globals }}",
    "messages that are changed": "{{ messages.append(1) }}",
    "another template": "{% include 'reward.json' %}",
    "import": "{% import 'os' as os %}{{ os }}",
}  # fmt: skip


@pytest.mark.slow  # some reach the limit of their time; the next but one has a part of them in the fast tier
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_with_the_rows_error(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.thread_time()
    template = ChatTemplate(HOSTILE[name], {})
    with pytest.raises(RowError) as caught:
        template.render(HI)
    assert str(caught.value).startswith("the chat template refuses this conversation: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert time.thread_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.5 * 2**20  # KiB


WRONG = {
    "deeply nested lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deeply nested blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "many operators": "{{ 1" + " + 1" * 20_000 + " }}",
    "no end": "{% for a in b %}",
    "an unknown filter": "{{ 1 | nothing }}",
    "an unknown tag": "{% nothing %}",
    "not Jinja": "{{",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_template_that_is_none_is_refused_when_it_is_loaded(name: str) -> None:
    with pytest.raises(RewardRTError) as caught:
        ChatTemplate(WRONG[name], {}).render(HI)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, BundleError | RowError)


def test_a_template_stops_in_a_process_that_may_take_little() -> None:
    """What takes memory, one after the other."""
    code = (
        "import json, sys\nfrom rewardrt.errors import RowError\nfrom rewardrt.text.rendering import ChatTemplate\n"
        "for source in json.load(sys.stdin):\n"
        "    try:\n        ChatTemplate(source, {}).render([{'role': 'user', 'content': 'Hi'}])\n"
        "    except RowError: continue\n"
        "    sys.exit(source)\n"
    )
    first = list(HOSTILE).index("a long string")
    sources = [source for source in list(HOSTILE.values())[first:] if "99) %}{% set" not in source]
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(sources), text=True, capture_output=True, check=False, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_long_conversation_is_far_from_the_limits() -> None:
    source = (
        "{% set ns = namespace(text='', last=0, list=[]) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% for n in messages %}{% if n.role == 'x' %}{% endif %}{% endfor %}"
        "{% set ns.list = ns.list + [m] %}{% set ns.text = ns.text ~ m.role ~ ': ' ~ (m.content | trim) ~ '\n' %}"
        "{% endfor %}{{ ns.text }}{{ ns.list | length }}"
    )
    messages = [
        {"role": "user" if index % 2 == 0 else "assistant", "content": f"text {index} " * 50} for index in range(600)
    ]
    began = time.thread_time()
    found = ChatTemplate(source, {}).render(messages)
    assert found.endswith("600")
    assert found.count("\n") == 600
    assert time.thread_time() - began < (5 if sys.gettrace() is None else 50)  # coverage traces every line
    long = [{"role": "user", "content": "x" * 20_000_000}, {"role": "assistant", "content": "y"}]
    assert len(ChatTemplate(source, {}).render(long)) > 20_000_000


@pytest.mark.slow
@pytest.mark.skipif(sys.gettrace() is not None, reason="coverage traces each line, and the limits are of time too")
def test_each_rendering_has_limits_of_its_own() -> None:
    template = ChatTemplate("{% for a in range(90000) %}{% for b in range(10) %}{% endfor %}{% endfor %}ok", {})
    assert [template.apply(HI) for _ in range(6)] == ["ok"] * 6  # 6 million turns, of which one may take 5


@pytest.mark.parametrize("source", ["{{ messages | indent }}", "{{ messages[0].content | indent(2, true) }}"])
def test_a_template_cannot_change_the_messages_of_the_row(source: str) -> None:
    """Jinja's own `indent` does: it appends a line's end to a list before it finds that this is no string."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Hello"},
    ]
    before = copy.deepcopy(messages)
    with pytest.raises(RowError, match="the chat template refuses this conversation"):
        ChatTemplate(source, {}).apply(messages)
    assert messages == before


EXPRESSIONS = st.recursive(
    st.sampled_from(["1", "'ab'", "messages", "messages[0].content", "[]", "{}", "none", "range(5)", "x", "10 ** 10", "'%s'"]),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "**", "%", "~", "==", "in", "and", "//"]), inner),
        st.builds("({} | {})".format, inner, st.sampled_from(["join", "list", "tojson", "center(9)", "length", "upper", "string", "first", "sum", "replace('a', 'b')", "indent(3)", "wordwrap(3)", "format(1)", "batch(2)", "items"])),
        st.builds("[{}, {}]".format, inner, inner),
        st.builds("{{'a': {}}}".format, inner),
        st.builds("({}).{}".format, inner, st.sampled_from(["upper()", "strip()", "join('ab')", "a", "split()", "format(1)", "replace('a', 'bb')"])),
    ),
    max_leaves=8,
)  # fmt: skip
TEMPLATES = st.one_of(
    st.builds("{{{{ {} }}}}".format, EXPRESSIONS),
    st.builds(
        "{{% for x in {} %}}{{{{ loop.index }}}}{{{{ loop.last }}}}{{{{ {} }}}}{{% endfor %}}".format,
        EXPRESSIONS,
        EXPRESSIONS,
    ),
    st.builds("{{% set y %}}{{{{ {} }}}}{{% endset %}}{{{{ y ~ {} }}}}".format, EXPRESSIONS, EXPRESSIONS),
)


def rendered(environment: ImmutableSandboxedEnvironment, source: str) -> str:
    try:
        return environment.from_string(source).render(messages=copy.deepcopy(HI))  # Jinja's `indent` changes a list
    except Exception as error:
        return type(error).__name__


@settings(deadline=None, max_examples=300)
@given(TEMPLATES)
def test_a_template_within_the_limits_renders_as_in_jinjas_own_sandbox(source: str) -> None:
    if "10 ** 10" in source:
        assert len(rendered(LimitedEnvironment(), source)) < 10**6
        return
    found, expected = rendered(LimitedEnvironment(), source), rendered(ImmutableSandboxedEnvironment(), source)
    assert found == expected or _shows_an_address(expected)


def _shows_an_address(text: str) -> bool:
    """Return whether a text has the place in memory of a generator, whatever filters made of the words around it."""
    return "generbtorobject" in "".join(text.lower().split()).replace("a", "b")


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet=st.sampled_from("{}%|()[]'\"abcfori n1*~\n")))
def test_any_text_as_a_template_is_rendered_or_refused(source: str) -> None:
    with suppress(RewardRTError):
        ChatTemplate(source, {}).render(HI)
