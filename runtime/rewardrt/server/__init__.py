"""A reward server: the protocols that scoring clients already speak, over one queue and one engine for each bundle.

    body -> schema -> protocol module (a Call) -> engine (one thread: tokenize, batch, score) -> protocol module -> body

`problem`, `schema`, `engine`, `models` and `call` are shared; each protocol is a module of its own; `routes` lists what
they serve, `app` answers HTTP and `process` owns sockets and signals.
"""

from __future__ import annotations

from rewardrt.server.options import ServerOptions

__all__ = ["ServerOptions"]
