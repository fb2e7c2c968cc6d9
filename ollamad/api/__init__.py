"""The REST surface: a quart-trio app on hypercorn that speaks docs/spec/api.md.

services.py   what the API needs from the daemon (protocols) and the errors these raise
app.py        the route table, and the app built from it
serve.py      listening sockets, and the server on them
http.py       accepted connections: their limits and deadlines, hypercorn's protocol
asgi.py       a request's way in and out: bounded bodies, fixed headers, streams
calls.py      what every handler gets: settings, services, the caller, bodies and replies
auth.py       who calls: tokens, sessions, the loopback rule
bodies.py     JSON bodies, decoded strictly, with errors that name the field
metrics.py    what the API measures of itself
websocket.py  one WebSocket: who may open it, what it asks
hub.py outbox.py feed.py   who listens, what waits for slow readers, what is told
status.py nodes.py models.py inference.py sessions.py   the handlers
"""
