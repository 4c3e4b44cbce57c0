"""Work in a process of its own, where it may crash or not end without its caller."""

import multiprocessing
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from visionattn.errors import UserError

__all__ = ["apart"]


def apart(work: Callable[[], None], seconds: float) -> None:
    """Do work, of which files are left, in a forked process of one thread; where there is no fork here, unlimited.

    Args:
        work: it raises nothing but UserError.

    Raises:
        UserError: the work did.
        TimeoutError: it took longer.
        ChildProcessError: its process has ended, by this signal.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        work()
        return
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(work, sender), daemon=True)
    with warnings.catch_warnings():  # that threads of the parent are missing in the child, which has need of none
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise TimeoutError
        if (refusal := receiver.recv()) is not None:
            raise UserError(refusal)
    except EOFError:
        process.join()
        code = process.exitcode or 0
        raise ChildProcessError(signal.Signals(-code).name if code < 0 else f"exit status {code}") from None
    finally:
        process.kill()
        process.join()


def _report(work: Callable[[], None], sender: Connection) -> None:
    torch.set_num_threads(1)
    refusal = None
    try:
        work()
    except UserError as error:
        refusal = str(error)
    sender.send(refusal)
