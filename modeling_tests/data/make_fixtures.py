"""Makes the audio files of this folder from one clip of ``demo_clips/``. Needs soundfile and soxr only.

    python modeling_tests/data/make_fixtures.py

The files are committed, so that the tests read the same bytes everywhere: encoders differ between versions of libsndfile.
"""

from pathlib import Path

import numpy as np
import soundfile
import soxr


HERE = Path(__file__).resolve().parent
CLIP = HERE.parents[1] / "demo_clips" / "en_hello-world.flac"


def main() -> None:
    speech, rate = soundfile.read(CLIP, dtype="float32")
    assert rate == 16000 and speech.ndim == 1

    # Two channels that differ: the right one is quieter, so that taking one channel is not the same as mixing both.
    wide = soxr.resample(speech, rate, 44100)
    stereo = np.stack([wide, 0.5 * wide], axis=1)
    soundfile.write(HERE / "stereo_44100.wav", stereo, 44100, subtype="PCM_16")

    soundfile.write(HERE / "mono_8000.wav", soxr.resample(speech, rate, 8000), 8000, subtype="PCM_16")
    soundfile.write(HERE / "mono_16000.mp3", speech, rate, format="MP3")
    soundfile.write(HERE / "vorbis_16000.ogg", speech, rate, format="OGG", subtype="VORBIS")
    soundfile.write(HERE / "opus_16000.ogg", speech, rate, format="OGG", subtype="OPUS")

    # 24 bits, at a rate above 16 kHz
    soundfile.write(HERE / "pcm24_24000.flac", soxr.resample(speech, rate, 24000), 24000, subtype="PCM_24")

    # Not audio, or not all of it
    (HERE / "text.wav").write_text("This is a text file whose name says it is audio.\n", encoding="utf-8")
    whole = CLIP.read_bytes()
    (HERE / "truncated.flac").write_bytes(whole[: len(whole) // 2])
    (HERE / "empty.wav").write_bytes(b"")


if __name__ == "__main__":
    main()
