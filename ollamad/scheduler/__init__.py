"""One request's life: admitted, routed, run here or forwarded, relayed, gone on with elsewhere.

dispatch.py   the way of a request, as entry node and as serving node
admission.py  lets requests in as there is room, in a fair order (decided by core.admission)
router.py     what is known of every node, for core.routing to decide with
relay.py      one answer, whichever nodes give it (decided by core.failover)
draining.py   answers of a node that drains, which move away after a while
resume.py     an answer whose entry node died
exchange.py   how requests and events travel between nodes
"""
