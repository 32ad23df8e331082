"""One command per node: the nodes meet, agree, start Ray and the ranks, watch each other, and end with the same sentence.

job.py        the life of one node. Begin here.
board.py      one node's place at the meeting, which head.py decides on node 0 and doorway.py serves
preflight.py  facts of every node, and what is wrong between them: nothing starts before all agree
messages.py, seal.py  what nodes say to each other, and the seal on it
agent.py      the ranks of one node, by torchrun's launcher

Starts training; imports engines for Ray's devices only.
"""
