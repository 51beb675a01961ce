"""The seccomp filter: a small BPF program, assembled here, that refuses system calls code has no use for.

Why not a package: libseccomp's bindings need libseccomp.so, which is not on every machine, and the
helper runs with the bare standard library. A list of refusals in cBPF is all that is wanted.
Numbers are those of asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64).
"""

import errno
import struct

PERMITTED = 0x7FFF0000
REFUSED = 0x00050000
KILLED = 0x80000000

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

REFUSALS: dict[str, tuple[int | None, int | None]] = {
    # the network; socketpair stays, for asyncio's self-pipe
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    # other processes' memory, descriptors, priorities and limits
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "setpriority": (141, 140), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "sched_setaffinity": (203, 122),
    "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97),
    "setns": (308, 268),
    # kernel surface with a history
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "io_setup": (206, 0), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "fanotify_init": (300, 262), "inotify_add_watch": (254, 27), "personality": (135, 92),
    "modify_ldt": (154, None), "lookup_dcookie": (212, 18),
    # memory that no limit counts, or that outlives its process
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180),
    # the machine
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "sethostname": (170, 161), "setdomainname": (171, 162),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "syslog": (103, 116), "vhangup": (153, 58), "iopl": (172, None), "ioperm": (173, None),
    # what Landlock does not see: files by handle, and a file's mode, owner, times and attributes
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "truncate": (76, 45),
    "chmod": (90, None), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    "mknod": (133, None), "mknodat": (259, 33), "file_setattr": (469, 469),
}  # fmt: skip
"""Always EPERM. Name -> number on x86_64 and on aarch64, None where the machine has no such call."""

SIGNALS: dict[str, tuple[int, int]] = {
    "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
}  # fmt: skip
"""Refused too where Landlock is too old (ABI < 6) to keep signals inside."""

_CLONE, _CLONE3, _IOCTL, _PRCTL = (56, 220), (435, 435), (16, 29), (157, 167)
_PRLIMIT, _KILL, _SOCKETPAIR = (302, 261), (62, 129), (53, 199)
_NEW_NAMESPACES = 0x7E020000
_X32_BIT = 0x40000000
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_PR_SET_DUMPABLE = 4
_UNIX, _STREAM = 1, 1


def program(machine: str, *, keep_signals: bool) -> bytes | None:
    """The filter for `machine` (as `os.uname().machine` says), None where its numbers are not known.

    `keep_signals`: signals are kept inside by Landlock, so that `kill` may stay.
    """
    if machine not in AUDIT_ARCH:
        return None
    column = 0 if machine == "x86_64" else 1
    refuse = _instruction(_RETURN, REFUSED | errno.EPERM)
    code = [
        _load(_ARCH_AT),
        _instruction(_JUMP_EQUAL, AUDIT_ARCH[machine], 1, 0),
        _instruction(_RETURN, KILLED),
        _load(_NUMBER_AT),
    ]
    if machine == "x86_64":
        code += [_instruction(_JUMP_AT_LEAST, _X32_BIT, 0, 1), _instruction(_RETURN, KILLED)]
    refusals: list[tuple[int | None, int | None]] = [*REFUSALS.values()]
    if not keep_signals:
        refusals += SIGNALS.values()
    for numbers in refusals:
        number = numbers[column]
        if number is not None:
            code += [_instruction(_JUMP_EQUAL, number, 0, 1), refuse]
    # clone3 keeps its flags behind a pointer; ENOSYS makes libc fall back to clone, whose flags show
    code += [
        _instruction(_JUMP_EQUAL, _CLONE3[column], 0, 1),
        _instruction(_RETURN, REFUSED | errno.ENOSYS),
    ]
    code += _when(_CLONE[column], [_argument(0), _instruction(_JUMP_ANY_BIT, _NEW_NAMESPACES, 0, 1), refuse])
    for forged in (_TIOCSTI, _TIOCLINUX):
        code += _when(_IOCTL[column], [_argument(1), _instruction(_JUMP_EQUAL, forged, 0, 1), refuse])
    # an undumpable process would hide its open files from the supervisor that sums them
    code += _when(_PRCTL[column], [_argument(0), _instruction(_JUMP_EQUAL, _PR_SET_DUMPABLE, 0, 1), refuse])
    code += _when(_PRLIMIT[column], [_argument(0), _instruction(_JUMP_EQUAL, 0, 1, 0), refuse])
    if not keep_signals:
        code += _when(_KILL[column], [_argument(0), _instruction(_JUMP_EQUAL, 0, 1, 0), refuse])
    # a datagram pair could still be sent to a path; a stream pair is connected for good
    code += _when(_SOCKETPAIR[column], [_argument(0), _instruction(_JUMP_EQUAL, _UNIX, 1, 0), refuse])
    code += _when(
        _SOCKETPAIR[column],
        [_argument(1), _instruction(_AND, 0xF), _instruction(_JUMP_EQUAL, _STREAM, 1, 0), refuse],
    )
    code.append(_instruction(_RETURN, PERMITTED))
    return b"".join(code)


def _instruction(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, value)


def _load(offset: int) -> bytes:
    return _instruction(_LOAD, offset)


def _argument(index: int) -> bytes:
    """The low half of an argument: both machines are little-endian, and none checked here is wider."""
    return _load(_ARGUMENTS_AT + 8 * index)


def _when(number: int, body: list[bytes]) -> list[bytes]:
    """Run `body` for one call only; the number is back in the accumulator afterwards."""
    return [_instruction(_JUMP_EQUAL, number, 0, len(body) + 1), *body, _load(_NUMBER_AT)]
