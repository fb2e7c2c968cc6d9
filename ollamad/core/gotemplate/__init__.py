"""Go's text/template, as far as Ollama's chat templates use it. Pure.

Models that were published for Ollama carry their prompt format in this language. The syntax is
Go's: trim markers, comments, if/else/with/range/define/template/block/break/continue, variables,
pipelines, and the functions that are listed in `functions.py`. Not there: methods of Go values
(but for those that a `Record` has as fields), complex numbers, and the functions that escape HTML.

A template may come from a stranger, so an execution has a bound on its steps and its output.

    template = parse("{{ range .Messages }}{{ .Content }}{{ end }}")   # TemplateError
    template.render({"Messages": [Record({"Content": "hi"})]})          # TemplateError
"""

from ollamad.core.gotemplate.errors import TemplateError
from ollamad.core.gotemplate.execution import MAX_OUTPUT, MAX_STEPS, Template, parse
from ollamad.core.gotemplate.functions import go_json
from ollamad.core.gotemplate.values import Record

__all__ = ["MAX_OUTPUT", "MAX_STEPS", "Record", "Template", "TemplateError", "go_json", "parse"]
