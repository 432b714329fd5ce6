"""The launcher: one cluster file in, a router and its workers running, watched and stopped together.

    engine.config    what the file says        plan          what will be started, with ports
    supervision      what to do when (pure)    cluster       doing it
    spawn, fork      two ways to start         lifeline      processes: who is alive, how they end
    state            the folder on disk        display, cli  what people see

It is the one place that knows both the engine and the router, because it starts both.
"""
