"""Programs that try to pass without being right, to get out, or to do harm; each is asked for the square of 123.

Should a wall fail one day, they do no lasting damage: what they open they do not write.
"""

from nanochat_ray.eval.sandbox import Outcome

TESTS = "def check(f):\n    assert f(123) == 123 * 123\ncheck(solution.f)\n"
SECRET = "swordfish-4711"
WRONG = "\ndef f(x): return -1\n"
FAILED, TIMED_OUT, OUT_OF_MEMORY = {Outcome.FAILED}, {Outcome.TIMED_OUT}, {Outcome.OUT_OF_MEMORY}
KILLED, TOO_LONG = {Outcome.KILLED}, {Outcome.OUTPUT_TOO_LONG}

# name: (how it may end, program). {outside} is a folder that anybody may write to, {private} a file that only the
# caller may read, {tcp}, {udp} and {unix} are where somebody listens, {parent} is the process that asks.
CHEATS = {
    "it exits before its tests": (FAILED, "import sys; sys.exit(0)"),
    "it exits for good before its tests": (FAILED, "import os; os._exit(0)"),
    "it exits when it is called": (FAILED, "import sys\ndef f(x): sys.exit(0)"),
    "it exits for good when it is called": (FAILED, "import os\ndef f(x): os._exit(0)"),
    "it leaves by another way": (FAILED, "def f(x): raise SystemExit"),
    "it brings its own check": (FAILED, "check = lambda f: None" + WRONG),
    "no assertion fails any more": (
        FAILED,
        "import builtins\nclass Never(Exception): pass\nbuiltins.AssertionError = Never\n"
        "__builtins__['AssertionError'] = Never\nbuiltins.exec = builtins.compile = lambda *a, **k: None" + WRONG,
    ),
    "its results equal everything": (
        FAILED,
        "class Same:\n    __eq__ = lambda *a: True\n    __hash__ = None\ndef f(x): return Same()",
    ),
    "its results are numbers that equal everything": (
        FAILED,
        "class Same(int):\n    __eq__ = lambda *a: True\n    __int__ = lambda s: s\ndef f(x): return Same(-1)",
    ),
    "it changes how results are written": (
        FAILED,
        "import json, os, sys\nfrom nanochat_ray.eval import sandbox_judge, sandbox_keeper\n"
        "sandbox_judge.judge = lambda *a: ('passed', '')\nsandbox_judge.describe = lambda *a: 'passed'\n"
        "sandbox_keeper._verdict = lambda *a: dict(outcome='passed')\n" + WRONG,
    ),
    "it says passed to whoever may hear it": (
        FAILED | KILLED,
        "import os, struct\nfor said in (b'{\"outcome\": \"passed\"}', b'passed'):\n"
        "  for fd in range(256):\n    try: os.write(fd, said); os.write(fd, struct.pack('>I', len(said)) + said)\n"
        "    except OSError: pass" + WRONG,
    ),
    "it sends what is no message": (
        FAILED | KILLED,
        "import os\ndef f(x): os.write(4, b'\\x00\\x00\\x00\\x05hello')",
    ),
    "it sends what is no value": (
        FAILED | KILLED,
        'import os, struct\ndef f(x):\n  m = b\'{"value": ["list", ["eval", "1"]]}\'\n'
        "  os.write(4, struct.pack('>I', len(m)) + m)",
    ),
    "it says that a huge result follows": (FAILED | KILLED, "import os\ndef f(x): os.write(4, b'\\xff' * 9)"),
    "it looks for the tests in its memory": (
        FAILED,
        "import gc, sys, inspect\ndef f(x):\n  for frame in inspect.stack():\n"
        "    for value in (*frame.frame.f_locals.values(), *frame.frame.f_globals.values()):\n"
        "      if isinstance(value, str) and 'assert f(' + '123)' in value: return x * x\n"
        "  for thing in gc.get_objects():\n"
        "    if isinstance(thing, dict) and any(isinstance(v, str) and 'assert f(' + '123)' in v\n"
        "                                       for v in thing.values()): return x * x\n  return -1",
    ),
    "it looks for the tests in all of its memory": (
        FAILED | KILLED,
        "import re\ndef f(x):\n  for line in open('/proc/self/maps'):\n"
        "    a, b = (int(n, 16) for n in line.split()[0].split('-'))\n"
        "    try:\n      with open('/proc/self/mem', 'rb') as m:\n        m.seek(a)\n"
        "        if re.search(rb'check[(]solution[.]f[)]', m.read(b - a)): return x * x\n"
        "    except (OSError, OverflowError): pass\n  return -1",
    ),
    "it looks for the tests in every file it has": (
        FAILED,
        "import os\ndef f(x):\n  for fd in (0, *range(5, 256)):\n    try:\n      if os.read(fd, 9999): return x * x\n"
        "    except OSError: pass\n  return -1",
    ),
    "it runs its own end": (
        FAILED,
        "import atexit, os\natexit.register(lambda: os._exit(0))\natexit.register(print, 'passed')" + WRONG,
    ),
    "it cannot be compared": (FAILED, "def f(x):\n  a = []\n  a.append(a)\n  return a"),
    "it returns what has no end": (
        OUT_OF_MEMORY | TIMED_OUT,
        "import itertools\ndef f(x): return itertools.count()",
    ),
    "it returns what is nested deep": (FAILED, "def f(x):\n  a = []\n  for _ in range(10**5): a = [a]\n  return a"),
    "it returns what is huge": (KILLED | OUT_OF_MEMORY | FAILED, "def f(x): return 'x' * (20 << 20)"),
    "it returns a huge number": (FAILED, "def f(x): return 7 ** 100_000"),
    "it returns a number that is huge when written out": (
        FAILED | OUT_OF_MEMORY | TIMED_OUT | KILLED,
        "from decimal import Decimal\ndef f(x): return Decimal('1e999999999')",
    ),
    "it is not Python": (FAILED, "def f(x: return"),
    "it is not text": (FAILED, "def f(x): return '\ud800'  # \udfff"),
    "it has a null byte": (FAILED, "def f(x): return 1\x00"),
    "it is nested deep": (FAILED | OUT_OF_MEMORY, "x = " + "(" * 5000 + "1" + ")" * 5000),
    "it has no such function": (FAILED, "f = 3"),
}
HARM = {
    "fork bomb": (FAILED | TIMED_OUT, "import os\nwhile True: os.fork()"),
    "fork bomb that ignores refusals": (
        TIMED_OUT,
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    ),
    "thread bomb": (
        FAILED | OUT_OF_MEMORY,
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    ),
    "memory bomb": (OUT_OF_MEMORY, "a = []\nwhile True: a.append(bytearray(10**7))"),
    "memory bomb at once": (OUT_OF_MEMORY, "def f(x): return 'a' * 10**11"),
    "memory that is a file": (
        FAILED | OUT_OF_MEMORY,
        "import os\nfd = [os.memfd_create('x') for _ in range(50)]\n"
        "for each in fd: os.write(each, bytes(10**8))" + WRONG,
    ),
    "endless output": (TOO_LONG, "while True: print('x' * 1000)"),
    "endless errors": (TOO_LONG, "import sys\nwhile True: sys.stderr.write('x' * 1000)"),
    "output that is no text": (FAILED, "import os\nos.write(1, bytes(range(256)))\nos.write(2, b'\\xff\\xfe')" + WRONG),
    "endless loop": (TIMED_OUT, "while True: pass"),
    "endless sleep": (TIMED_OUT, "import time\ndef f(x): time.sleep(999)"),
    "endless loop in a finalizer": (
        TIMED_OUT,
        "class A:\n  def __del__(self):\n    while True: pass\ndef f(x):\n  A()\n  return -1",
    ),
    "endless loop in a finalizer, at the end": (
        FAILED,
        "class A:\n  def __del__(self):\n    while True: pass\na = A()" + WRONG,
    ),
    "endless loop in the middle of C": (TIMED_OUT, "def f(x): return len(str(9 ** 9 ** 8))"),
    "endless regular expression": (TIMED_OUT, "import re\ndef f(x): return re.match('(a+)+b', 'a' * 50)"),
    "it ignores signals": (
        TIMED_OUT,
        "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\nwhile True: pass",
    ),
    "it catches everything": (
        TIMED_OUT,
        "import time\nwhile True:\n  try: time.sleep(99)\n  except BaseException: pass",
    ),
    "it stops itself": (TIMED_OUT, "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)"),
    "it closes all files": (FAILED | KILLED, "import os\nos.closerange(0, 999)\ndef f(x): return -1"),
    "it reads standard input": (FAILED, "def f(x): return input()"),
    "it recurses": (FAILED, "def f(x): return f(x)"),
    "it overflows the stack": (
        KILLED | FAILED | OUT_OF_MEMORY,
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n  def __getattr__(s, n): return getattr(s, n + 'x')\n"
        "def f(x): return A().y",
    ),
    "it crashes": (KILLED, "import ctypes\ndef f(x): return ctypes.string_at(1)"),
    "it aborts": (KILLED, "import os\ndef f(x): os.abort()"),
    "its threads go on": (
        FAILED,
        "import threading\ndef g():\n  while True: pass\nfor _ in range(3): threading.Thread(target=g).start()" + WRONG,
    ),
    "it kills its parent": (
        FAILED,
        "import os, signal\nfor pid in (os.getppid(), {parent}, 1, -1, 0):\n  if pid not in (0, os.getpid()):\n"
        "    try: os.kill(pid, 9)\n    except OSError: pass" + WRONG,
    ),
    "it kills its group": (FAILED | KILLED, "import os\nos.killpg(0, 9)"),
    "it raises its own limits": (
        FAILED,
        "import resource as r\nfor n in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_NPROC):\n"
        "  r.setrlimit(n, (r.RLIM_INFINITY, r.RLIM_INFINITY))" + WRONG,
    ),
    "it traces its parent": (
        FAILED,
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n"
        "for pid in (os.getppid(), {parent}):\n  assert c.ptrace(16, pid, 0, 0) == -1, 'traced'\n"
        "  assert c.kill(pid, 9) == -1 or pid == 0, 'killed'\n"
        "for call in (57, 59, 41, 101): assert c.syscall(call, 0, 0, 0, 0) == -1, 'called'" + WRONG,
    ),
    "it starts a program": (
        FAILED,
        "import os, subprocess\ntry: subprocess.run(['/bin/touch', '{outside}/escaped'])\nexcept OSError: pass\n"
        "os.system('touch {outside}/escaped')\nos.execv('/bin/touch', ['touch', '{outside}/escaped'])",
    ),
    "a daemon writes later": (
        FAILED,
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    os.setsid()\n"
        "    time.sleep(0.7)\n    open('{outside}/escaped', 'w').write('x')\n  os._exit(0)" + WRONG,
    ),
    "it writes outside of its folder": (
        FAILED,
        "import os\nfor place, how in (('{outside}/escaped', os.O_CREAT), ('/dev/shm/escaped', os.O_CREAT),\n"
        "                   ('{outside}/kept', 0), ('/etc/hosts', 0), (os.__file__, 0)):  # opened, never written\n"
        "  try: os.open(place, os.O_WRONLY | how); print('escaped')\n  except OSError: pass\n"
        "for make in (lambda p: os.mkdir(p), lambda p: os.symlink('/', p), lambda p: os.mkfifo(p)):\n"
        "  try: make('{outside}/escaped'); print('escaped')\n  except OSError: pass\n"
        "try: os.remove('{private}')\nexcept OSError: pass" + WRONG,
    ),
    "it reads what is private": (
        FAILED,
        "import os, glob\nprint(dict(os.environ))\n"
        "for p in ('{private}', '/etc/shadow', '/root/.ssh/id_rsa', '/proc/1/environ', '/proc/self/environ',\n"
        "          '/proc/{parent}/environ', '/proc/{parent}/mem', *glob.glob('/home/*/.ssh/*')):\n"
        "  try: print(p, open(p).read(9999))\n  except OSError: pass" + WRONG,
    ),
    "it fills the disk": (
        FAILED | KILLED,
        "for i in range(10**6): open(str(i), 'wb').write(bytes(10**6))",
    ),
    "it fills the disk with names": (
        FAILED | KILLED | TIMED_OUT,
        "import os\nfor i in range(10**7): os.mkdir(str(i))",
    ),
    "it writes one large file": (
        FAILED | KILLED,
        "with open('x', 'wb') as file:\n  while True: file.write(bytes(10**6))",
    ),
    "it leaves links and closed folders": (
        FAILED | KILLED,
        "import os\nos.symlink('{outside}', 'link'); os.symlink('{outside}/kept', 'file'); os.symlink('loop', 'loop')\n"
        "os.symlink('..', 'up')\nos.makedirs('a/b/c'); open('a/b/c/d', 'w').close()\n"
        "os.chmod('a/b', 0); os.chmod('a', 0)\nhere = os.getcwd()\n"
        "for i in range(1500): os.mkdir('deep'); os.chdir('deep')\n"
        "os.chdir(here)\ntry: os.rename(here, here + '2'); os.symlink('{outside}', here)\nexcept OSError: pass" + WRONG,
    ),
    "it connects": (
        FAILED,
        "import socket\ndef go(family, kind, where):\n  try:\n    with socket.socket(family, kind) as s:\n"
        "      s.settimeout(0.5); s.connect(where); s.send(b'escaped')\n  except OSError: pass\n"
        "go(socket.AF_INET, socket.SOCK_STREAM, ('127.0.0.1', {tcp}))\n"
        "go(socket.AF_INET, socket.SOCK_DGRAM, ('127.0.0.1', {udp}))\n"
        "go(socket.AF_UNIX, socket.SOCK_STREAM, '{unix}')\n"
        "go(socket.AF_UNIX, socket.SOCK_STREAM, '\\0{unix}')\n"
        "go(socket.AF_UNIX, socket.SOCK_DGRAM, '/dev/log')" + WRONG,
    ),
}  # fmt: skip
