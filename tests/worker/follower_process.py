"""A follower rank as its own process: python follower_process.py SPEC_JSON RANK."""

import json
import sys

from flm.worker.group.rank import GroupSpec, Rank

if __name__ == "__main__":
    rank = Rank(GroupSpec(**json.loads(sys.argv[1])), int(sys.argv[2]))
    rank.load(lambda fraction: None)
    rank.connect()
    rank.serve()
