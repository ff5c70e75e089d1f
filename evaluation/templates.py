"""lm-eval's templates in jinja's sandbox.

A task's templates stand in params.yaml, which may be a stranger's, and lm-eval renders them as programs that may reach
everything in Python (`{{ cycler.__init__.__globals__.os }}`). Here they read rows and change nothing: attributes that
begin with an underscore are refused, and so is whatever would change a list or a dict. Values are lm-eval's to the
character; this module is imported before a task is made.
"""

import functools

import lm_eval.utils
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from evaluation import nulls


def _sandbox() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True, finalize=nulls.finalize
    )
    made.filters |= lm_eval.utils.env.filters
    # lm-eval compiles a template again at every use: most of the time that scoring spends outside the model
    made.from_string = functools.lru_cache(maxsize=256)(made.from_string)
    return made


# lm-eval looks the name up at every use
environment = lm_eval.utils.env = _sandbox()
