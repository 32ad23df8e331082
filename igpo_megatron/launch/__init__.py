"""One command per node: the nodes meet, agree, start Ray and the ranks, watch each other, and end with the same sentence.

igpo launch (node 0)                        igpo launch (node k)
    Board.meet ◄────── facts of every node ────── Board.meet         preflight: nothing is started before all agree
    ray start --head                              ray start          engines live here
    agent: torchrun's launcher, its ranks         agent              rollout nodes have none
    Board ◄────── heartbeats, reports ─────────── Board              node 0 decides, every node reads the verdict

node.py        what a node is, and the addresses and ports of this one
preflight.py   facts, and what is wrong between them (pure)
messages.py    what nodes say to node 0 and hear from it: schemas and bounds
seal.py        challenge, response, and the seal on every message
head.py        what node 0 decides (pure)
doorway.py     the HTTP server on node 0, and the others' way to it
board.py       one node's place at the meeting: the thread that talks
rendezvous.py  torchrun's store, on its own port
processes.py   children and everything below them
agent.py       the ranks of one node, by torchrun's launcher
job.py         the life of one node
"""
