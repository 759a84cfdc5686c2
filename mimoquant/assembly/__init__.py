"""A RUN IS PUT TOGETHER, ONCE: machine, team, plan, refusals, tokens, clock; what api and the command line share.

May import everything but report, api and cli. Knows no option parser and prints nothing: notes go to a `Watcher`.
"""
