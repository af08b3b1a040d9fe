"""A reward server: several protocols of scoring clients, over one queue and one engine for each bundle.

    body -> schema -> protocol module (a Call) -> engine (one thread: tokenize, batch, score) -> protocol module -> body

`problem`, `schema`, `engine`, `models` and `call` are shared by all protocols. Each protocol is a module of its own;
`routes` lists the routes they serve, `app` answers HTTP, and `process` owns sockets and signals.
"""

from __future__ import annotations

from rewardrt.server.options import ServerOptions

__all__ = ["ServerOptions"]
