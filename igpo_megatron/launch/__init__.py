"""One command per node: the nodes meet, agree, start Ray and the ranks, watch each other, and end with the same sentence.

igpo launch (node 0)                        igpo launch (node k)
    Board.meet ◄────── facts of every node ────── Board.meet         preflight: nothing is started before all agree
    ray start --head                              ray start          engines live here
    agent: torchrun's launcher, its ranks         agent              rollout nodes have none
    Board ◄────── heartbeats, reports ─────────── Board              node 0 decides, every node reads the verdict

node.py        what a node is, and the addresses and ports of this one
preflight.py   facts, and what is wrong between them (pure)
board.py       the store on node 0 through which nodes talk
processes.py   children and everything below them
agent.py       the ranks of one node, by torchrun's launcher
job.py         the life of one node
"""
