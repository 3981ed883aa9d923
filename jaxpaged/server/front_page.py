"""The page at ``/``: what this is and where things are, for somebody who opens the server's address in a browser.

Plain HTML, made anew for each visit; no script, nothing from elsewhere, and a policy that allows neither.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; }
h1 small { font-weight: normal; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
p, small, dt { opacity: .7; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.5rem; }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .875rem/1.5 ui-monospace, monospace; }
pre { background: rgb(128 128 128 / .12); padding: .8rem 1rem; white-space: pre-wrap; border-radius: 6px; }
table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid rgb(128 128 128 / .3); padding: .3rem .8rem .3rem 0; vertical-align: top; }
"""

HEADERS: Mapping[str, str] = {
    "content-security-policy": "default-src 'none'; img-src data:; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    + "'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@dataclasses.dataclass(frozen=True)
class FrontPage:
    """What the page says.

    Attributes:
        version: Of this program.
        ready: Whether requests are taken.
        state: The same in words; while loading, how far it is.
        models: The model's names; empty while it is not known.
        max_model_len: Longest context in tokens; None while it is not known.
        address: Of this server as the visitor wrote it, without a path at its end.
        root: Prefix of all paths behind a proxy.
        routes: Method, path and meaning of each route.
    """

    version: str
    ready: bool
    state: str
    models: Sequence[str]
    max_model_len: int | None
    address: str
    root: str
    routes: Sequence[tuple[str, str, str]]

    def json(self) -> dict[str, Any]:
        """Returns it for a program."""
        return {
            "name": "jaxpaged",
            "version": self.version,
            "status": self.state,
            "models": list(self.models),
            "max_model_len": self.max_model_len,
            "routes": {f"{method} {self.root}{path}": meaning for method, path, meaning in self.routes},
        }

    def html(self) -> str:
        """Returns it for a person; while the server is not ready, it comes again every 5 s."""
        facts = {"State": escape(self.state), "Base URL for clients": f"<code>{escape(self.address + self.root)}/v1</code>"}
        if self.models:
            names = ", ".join(f"<code>{escape(name)}</code>" for name in self.models)
            facts["Model"] = f"{names}, context of {self.max_model_len} tokens"
        body = {
            "model": self.models[0] if self.models else "...",
            "messages": [{"role": "user", "content": "What is a page?"}],
            "stream": True,
        }
        quoted = json.dumps(body).replace("'", "'\\''")
        curl = f"curl -N {self.address}{self.root}/v1/chat/completions \\\n  -H 'Content-Type: application/json' \\\n  -d '{quoted}'"
        return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
{"" if self.ready else '<meta http-equiv="refresh" content="5">'}
<title>jaxpaged{"".join(f" · {escape(name)}" for name in self.models[:1])}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<h1>jaxpaged <small>{escape(self.version)}</small></h1>
<p>A PagedAttention inference engine on JAX, serving OpenAI's HTTP API.</p>
<dl>
{"".join(f"<dt>{name}</dt><dd>{fact}</dd>" for name, fact in facts.items())}
</dl>
<h2>Try it</h2>
<pre>{escape(curl)}</pre>
<h2>Routes</h2>
<table>
{"".join(self._row(*route) for route in self.routes)}
</table>
</body>
</html>
"""

    def _row(self, method: str, path: str, meaning: str) -> str:
        shown = f"<code>{escape(path)}</code>"
        if method == "GET" and "{" not in path:
            shown = f'<a href="{escape(self.root + path)}">{shown}</a>'
        return f"<tr><td><code>{method}</code></td><td>{shown}</td><td>{escape(meaning)}</td></tr>\n"
