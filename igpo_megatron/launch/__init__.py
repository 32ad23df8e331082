"""One command per node: the nodes meet, compare settings, start Ray and the ranks, watch each other, and report the same end.

job.py        the life of one node. Begin here.
board.py      one node's side of the meeting; on node 0 head.py decides and doorway.py serves
preflight.py  facts about every node, and their disagreements: nothing starts before all agree
messages.py, seal.py  the messages between nodes, and their authentication
agent.py      the ranks of one node, by torchrun's launcher

Starts training; imports engines for Ray's devices only.
"""
