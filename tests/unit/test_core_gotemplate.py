"""Go's template language: what each construct prints, what is refused, and the bounds."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamad.core.gotemplate import MAX_STEPS, Record, TemplateError, parse
from ollamad.core.gotemplate.functions import printed

DATA: dict[str, Any] = {
    "Name": "world",
    "Zero": 0,
    "Two": 2,
    "Half": 0.5,
    "Yes": True,
    "Empty": "",
    "List": ["a", "b", "c"],
    "Map": {"b": 1, "a": {"c": "deep"}},
    "Nil": None,
    "Person": Record({"First": "Ada", "Tags": ["x"]}),
    "Tool": Record({"Name": "add"}, shown={"name": "add", "html": "<&>"}),
}


# Expected values are what Go 1.23 prints.
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("plain { } text", "plain { } text"),
        ("", ""),
        ("{{ .Name }}", "world"),
        ("{{.Name}}", "world"),
        ("{{ .Missing }}", "<no value>"),
        ("{{ .Map.a.c }}{{ .Map.x.y }}", "deep<no value>"),
        ("{{ .Person.First }}", "Ada"),
        ("{{ . | len }}", "11"),
        # Trim markers and comments.
        ("a \n {{- .Name -}} \t\n b", "aworldb"),
        ("a {{ .Name -}} b", "a worldb"),
        ("a {{- /* no */ -}} b", "ab"),
        ("a {{/* a\n }} b */}} b", "a  b"),
        ("{{ -3 }}", "-3"),
        ("{{- 3 -}}", "3"),
        ("{{ 3 }}-}}", "3-}}"),
        # Literals.
        (r'{{ "a\tb\"\u00e9\x41" }}', 'a\tb"éA'),
        ("{{ `raw\\n` }}", "raw\\n"),
        ("{{ 'a' }} {{ 0x1F }} {{ 010 }} {{ 1_000 }} {{ 1e3 }} {{ 1.5 }}", "97 31 8 1000 1000 1.5"),
        ("{{ true }} {{ print nil }}", "true <nil>"),
        ('{{ "}}" }}', "}}"),
        # Branches.
        ("{{ if .Yes }}1{{ else }}2{{ end }}", "1"),
        ("{{ if .Zero }}1{{ else if .Empty }}2{{ else if .Two }}3{{ else }}4{{ end }}", "3"),
        ("{{ if .List }}l{{ end }}{{ if .Nil }}n{{ end }}{{ if .Person }}p{{ end }}", "lp"),
        ("{{ with .Person }}{{ .First }}{{ $.Name }}{{ end }}", "Adaworld"),
        ("{{ with .Empty }}no{{ else }}{{ .Name }}{{ end }}", "world"),
        ("{{ with .Empty }}{{ else with .Two }}{{ . }}{{ end }}", "2"),
        ("{{ with $x := .Two }}{{ $x }}{{ . }}{{ end }}", "22"),
        # Loops.
        ("{{ range .List }}{{ . }}{{ end }}", "abc"),
        ("{{ range $i, $x := .List }}{{ $i }}{{ $x }}{{ end }}", "0a1b2c"),
        ("{{ range $x := .List }}{{ $x }}{{ . }}{{ end }}", "aabbcc"),
        ("{{ range $k, $v := .Map }}{{ $k }},{{ end }}", "b,a,"),
        ("{{ range .Nil }}x{{ else }}none{{ end }}", "none"),
        ("{{ range 3 }}{{ . }}{{ end }}", "012"),
        ('{{ range .List }}{{ if eq . "b" }}{{ continue }}{{ end }}{{ . }}{{ end }}', "ac"),
        ('{{ range .List }}{{ if eq . "b" }}{{ break }}{{ end }}{{ . }}{{ end }}', "a"),
        ("{{ range .List }}{{ $.Two }}{{ end }}", "222"),
        # Variables.
        ("{{ $x := 1 }}{{ if .Yes }}{{ $x = 2 }}{{ end }}{{ $x }}", "2"),
        ("{{ $x := 1 }}{{ if .Yes }}{{ $x := 2 }}{{ end }}{{ $x }}", "1"),
        ("{{ $x := .Person }}{{ $x.First }}{{ $x.Tags }}", "Ada[x]"),
        ("{{ $x:=1 }}{{ $y :=2 }}{{ $x }}{{ $y }}", "12"),
        ("{{ range $i, $_ := .List }}{{ end }}{{ $.Name }}", "world"),
        # Pipelines and parentheses.
        ('{{ .Name | printf "%s-%d" "a" | len }}', "19"),
        ('{{ .Name | printf "%s-%s" "a" }}', "a-world"),
        ("{{ (index .List 1) | len }}", "1"),
        ("{{ (.Person).First }}{{ (print .Name).Missing }}", None),
        ("{{ len (slice .List 1) }}{{ slice .List 0 2 }}{{ slice .Name 1 3 }}", "2[a b]or"),
        ('{{ index .Map "b" }}{{ index .Map "a" "c" }}{{ index .Map "z" }}', "1deep<no value>"),
        # Functions.
        ("{{ eq .Two 1 2 }} {{ eq .Name .Name }} {{ ne .Two 2 }}", "true true false"),
        ('{{ lt 1 2 }}{{ le 2 2 }}{{ gt 1 2 }}{{ ge 1.5 2.5 }}{{ lt "a" "b" }}',
         "truetruefalsefalsetrue"),
        ("{{ and .Yes .Name }}{{ and .Zero .Name }}{{ or .Zero .Name }}{{ or .Zero .Empty }}",
         "world0world"),
        # What is not needed is not looked at.
        ("{{ and .Nil (index .List 9) }}{{ or .Yes (index .List 9) }}", "<no value>true"),
        ("{{ not .Zero }}{{ not .List }}", "truefalse"),
        ('{{ print 1 2 "a" "b" 3 }}|{{ println "a" 1 }}', "1 2ab3|a 1\n"),
        (r'{{ printf "%5d|%-5s|%05d|%.2f|%q|%v|%t|%x|%%" 42 "ab" 7 1.5 "q\n" .List true 255 }}',
         '   42|ab   |00007|1.50|"q\\n"|[a b c]|true|ff|%'),
        ('{{ printf "%d %s" "x" }}', "%!d(string=x) %!s(MISSING)"),
        ('{{ printf "a" 1 }}', "a%!(EXTRA int=1)"),
        ("{{ json .Map }}{{ .Tool }}", '{"b":1,"a":{"c":"deep"}}{"name":"add",'
         '"html":"\\u003c\\u0026\\u003e"}'),
        ("{{ json .Nil }}{{ json .Name }}", 'null"world"'),
        ("{{ .Map }}", "map[a:map[c:deep] b:1]"),
        ("{{ .Person }}", "{Ada [x]}"),
        ("{{ .Half }} {{ 1e21 }} {{ 100000000000000000000.0 }}", "0.5 1e+21 100000000000000000000"),
        # Templates within templates.
        ('{{ define "T" }}<{{ .First }}>{{ end }}{{ template "T" .Person }}', "<Ada>"),
        ('{{ block "B" .Person }}{{ .First }}{{ end }}', "Ada"),
        ('{{ define "T" }}{{ . }}{{ end }}{{ template "T" }}', "<no value>"),
    ],
)  # fmt: skip
def test_what_a_template_prints(source: str, expected: str | None) -> None:
    if expected is None:  # Go refuses these as well
        with pytest.raises(TemplateError):
            print(parse(source).render(DATA))
    else:
        assert parse(source).render(DATA) == expected


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ .Name", "not closed"),
        ("{{ if .Yes }}", "not ended"),
        ("{{ range .List }}x", "not ended"),
        ("{{ end }}", "nothing for {{end}}"),
        ("{{ else }}", "nothing for {{else}}"),
        ("{{ }}", "empty"),
        ("{{ $x }}", r"no variable \$x"),
        ("{{ if .Yes }}{{ $x := 1 }}{{ end }}{{ $x }}", r"no variable \$x"),
        ("{{ $x = 1 }}", r"no variable \$x"),
        ("{{ nope .Name }}", "no function 'nope'"),
        ("{{ .Name .Two }}", "takes no arguments"),
        ("{{ .Name | 3 }}", "must be a function"),
        ("{{ | len }}", "missing"),
        ("{{ len (.Name }}", "unexpected"),
        ("{{ break }}", "outside of a range"),
        ('{{ define "T" }}{{ break }}{{ end }}', "outside of a range"),
        ("{{ template .Name }}", "name in quotes"),
        ('{{ "\\q" }}', "no escape"),
        ('{{ "a" "b" }}', "takes no arguments"),
        ("{{ # }}", "unexpected"),
        ("a\nb{{ .x }}\n{{ end }}", "line 3"),
        ("{{ if .Yes }}" * 200 + "{{ end }}" * 200, "deep"),
        ("{{ len " + "(" * 500 + ".Name" + ")" * 500 + " }}", "deep"),
    ],
)
def test_what_cannot_be_read(source: str, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        parse(source)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ .Person.Last }}", "no field Last"),
        ("{{ .Name.First }}", "no field First in a string"),
        ("{{ index .List 3 }}", "out of range"),
        ("{{ index .List -1 }}", "out of range"),
        ("{{ slice .List 2 1 }}", "behind"),
        ("{{ slice .List 9 }}", "out of range"),
        ("{{ len .Two }}", "len of a int"),
        ("{{ eq .Two .Name }}", "cannot be compared"),
        ("{{ lt .List .List }}", "no order"),
        ("{{ range .Name }}{{ end }}", "cannot go through a string"),
        ('{{ template "T" }}', "no template 'T'"),
        ('{{ define "T" }}{{ template "T" }}{{ end }}{{ template "T" }}', "more than"),
        ("{{ len }}", "wrong number"),
        ("{{ range 1000000000 }}{{ end }}", "steps"),
        ("{{ range 10000 }}{{ range 10000 }}{{ end }}{{ end }}", "steps"),
        ('{{ printf "%999999999d" 1 }}', "width"),
        ("a\n{{ index .List 3 }}", "line 2"),
    ],
)
def test_what_cannot_be_done(source: str, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        parse(source).render(DATA)


def test_an_output_has_a_bound() -> None:
    data = {"Long": "x" * (1 << 20)}
    with pytest.raises(TemplateError, match="characters"):
        parse("{{ range 1000 }}{{ $.Long }}{{ end }}").render(data)
    assert MAX_STEPS > 1000


def test_a_template_is_rendered_many_times() -> None:
    template = parse("{{ $x := .A }}{{ range 2 }}{{ $x = . }}{{ end }}{{ $x }}{{ .A }}")
    assert [template.render({"A": number}) for number in (5, 6)] == ["15", "16"]


WORDS = st.sampled_from(
    ["{{", "}}", "{{-", "-}}", " ", ".", ".A", "$x", ":=", "=", "if", "range", "end", "else",
     "with", "(", ")", "|", "len", '"', "`", "'a'", "1", "-", ",", "define", '"T"', "template",
     "/*", "*/", "\n", "and", "é"]
)  # fmt: skip


@given(st.lists(WORDS, max_size=30).map("".join))
def test_any_text_is_read_or_refused_by_name(source: str) -> None:
    try:
        template = parse(source)
        template.render({"A": ["a", 1, None]})
    except TemplateError:
        pass


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_printed_floats_read_back(number: float) -> None:
    assert float(printed(number)) == number
