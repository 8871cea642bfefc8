"""DECIDES. The pure room: what happened goes in, what is owed comes out.

* `events`   what happened to us and matters, past tense
* `effects`  what we owe the world, imperative
* `session`  one session's life: the table of stages, then one small function per row
* `book`     every session of this vehicle; `step(book, event)`, `due(book, live)`, `owed(book, live)`
* `token`    the paper's token, the typed messages, and who signed them
* `messages` what consumer and provider say to each other, byte for byte
* `record`   a finished session as an OCMF payload

Nothing here knows a clock, a file, a socket, a task, a random number or a float: time and readings are arguments.
Everything raises only `agent.errors.Refused` (for what strangers send) or assertions (for our own mistakes).
"""
