"""``verify`` with Muon's matrices dealt out over two ranks and repeated beyond them, as on a thousand ranks:
``torchrun … limited_group.py OPTIONS.json``."""

from lab_utils.engine import colossal, verify

colossal.even_shards = lambda sizes, ranks: min(2, ranks)

if __name__ == "__main__":
    verify.main()
