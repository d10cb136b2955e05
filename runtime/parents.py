"""Processes that one of ours has started end when it does, and do not go on unseen."""

import multiprocessing
import os
import threading
import time


def end_with_parent(seconds=0.0):
    """Have this process end `seconds` after the one that started it, however that has ended.

    In a script's background, and under nohup, it ignores the signal that it is sent then.
    """

    def wait():
        multiprocessing.parent_process().join()
        time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
