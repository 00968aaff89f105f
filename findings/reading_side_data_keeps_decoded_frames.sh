#!/usr/bin/env bash
# Guess:   in a loop over container.decode() a frame is freed as the next one takes its name; to look at its side data first changes nothing.
# So:      frame.side_data stores a container on the frame that holds the frame, a cycle, made even where there are no side data. From then on
#          the picture is freed by the garbage collector alone, which counts Python's objects, some of a hundred bytes and one of megabytes alike:
#          it comes round when about a hundred frames are waiting. frame.rotation reads the same data without that.
# Version: av 18.1.0 (Python 3.11; how many frames wait depends on the thresholds of the collector, and with it off all do)
# Why:     the display matrix (how a phone was held), mastering light levels and motion vectors are side data, so a reader of training clips asks
#          each frame. A hundred frames of 4K are 1.2 GB a process in place of 12 MB, times the workers of a loader. Ask one frame alone, or
#          collect every few frames.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q av==18.1.0 numpy==2.4.6
cat > decode.py <<'PY'
import gc
import resource
import sys

import av

what, collects = sys.argv[1], sys.argv[2] == "collects"


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


most, start = 0, None
with av.open("clip.mp4") as container:
    for index, frame in enumerate(container.decode(video=0)):
        if what == "side_data":
            assert len(frame.side_data) == 0  # there are none to keep
        elif what == "rotation":
            assert frame.rotation == 0
        start = start or peak()
        if index % 10 == 9:
            most = max(most, sum(isinstance(one, av.VideoFrame) for one in gc.get_objects()))
            if collects:
                gc.collect()
print(index + 1, most, round(peak() - start))
PY
env/bin/python - <<'PY'
import platform
import subprocess
import sys

import av
import numpy

print("av", av.__version__, "Python", platform.python_version())
with av.open("clip.mp4", "w") as out:
    stream = out.add_stream("mpeg4", rate=30)
    stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"  # 1.4 MB a frame
    for level in range(150):
        out.mux(stream.encode(av.VideoFrame.from_ndarray(numpy.full((720, 1280, 3), level, numpy.uint8), "rgb24")))
    out.mux(stream.encode())

ways = {"nothing": ("nothing", ""), "rotation": ("rotation", ""), "side_data": ("side_data", ""), "side_data, collected": ("side_data", "collects")}
held = True
for name, way in ways.items():
    done = subprocess.run([sys.executable, "decode.py", *way], check=True, capture_output=True, text=True)
    frames, alive, grown = map(int, done.stdout.split())
    print(f"{frames} frames, each asked for {name:21}: at most {alive:3} alive at once, {grown:3} MB more than after the first")
    kept = name == "side_data"
    held &= frames == 150 and (alive > 50 and grown > 50 if kept else alive < 15 and grown < 40)
raise SystemExit(not held)
PY

# Output seen:
#   av 18.1.0 Python 3.11.7
#   150 frames, each asked for nothing              : at most   2 alive at once,   0 MB more than after the first
#   150 frames, each asked for rotation             : at most   2 alive at once,   0 MB more than after the first
#   150 frames, each asked for side_data            : at most 121 alive at once, 123 MB more than after the first
#   150 frames, each asked for side_data, collected : at most  12 alive at once,   0 MB more than after the first
