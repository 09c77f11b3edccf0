// Plays sound without gaps, while it arrives or afterwards, from any place.

const LEAD_S = 0.06; // between the decision to play and the first sample
const SPARE_S = 0.15; // made ahead beyond what the measured pace asks for

// Mono 16-bit sound that may still be growing.
export class Sound {
  constructor(rateHz, nWanted) {
    this.rateHz = rateHz;
    this.nWanted = nWanted; // samples it will have
    this.samples = new Int16Array(nWanted);
    this.length = 0; // samples it has
    this.pace = 1; // seconds made in a second
    this.done = false;
  }

  push(piece, pace) {
    this.samples.set(piece, this.length);
    this.length += piece.length;
    if (pace) this.pace = pace;
  }

  finish() {
    this.nWanted = this.length;
    this.done = true;
  }

  // A 16-bit WAV of the samples from `first` on.
  wav(first = 0) {
    return wavOf(this.samples.subarray(first, this.length), this.rateHz);
  }
}

// One sound at a time. Pieces are scheduled back to back on a context that runs at the sound's own
// rate, so that no piece is resampled by itself, which would be heard at its borders.
export class Player {
  // onChange(): the state ("idle", "waiting", "playing") is another.
  constructor(onChange, context) {
    this.context = context;
    this.onChange = onChange;
    this.sound = null;
    this.state = "idle";
    this.from = this.next = 0; // where it began; first sample that is not scheduled
    this.origin = null; // frame of the context at which sample 0 plays; null: not playing yet
    this.sources = new Set();
  }

  // Call it in a click: a page may make sound only after the user touched it.
  play(sound, from = 0) {
    this.stop();
    this.context ||= new AudioContext({ sampleRate: sound.rateHz });
    this.context.resume?.();
    this.sound = sound;
    this.from = this.next = Math.max(0, Math.min(from, sound.nWanted - 1));
    this.setState("waiting");
    this.pump();
  }

  stop() {
    for (const source of this.sources) {
      source.onended = null;
      source.stop();
    }
    this.sources.clear();
    this.sound = this.origin = null;
    this.setState("idle");
  }

  // The sample that is heard now.
  get position() {
    if (this.origin === null) return this.next;
    const frame = this.context.currentTime * this.context.sampleRate;
    return Math.max(this.from, Math.min(frame - this.origin, this.next));
  }

  // Schedules what has arrived; call it whenever the sound has grown or is done.
  pump() {
    const { sound, context } = this;
    if (!sound) return;
    const now = Math.ceil(context.currentTime * context.sampleRate);
    if (this.origin === null || this.origin + this.next < now) {
      this.origin = null; // not begun, or it ran dry
      if (!this.lasts()) {
        if (sound.done) this.stop();
        else this.setState("waiting");
        return;
      }
      this.origin = now + Math.ceil(LEAD_S * context.sampleRate) - this.next;
    }
    this.setState("playing");
    if (this.next >= sound.length) return;
    const piece = Float32Array.from(
      sound.samples.subarray(this.next, sound.length),
      (sample) => sample / 32768,
    );
    const buffer = context.createBuffer(1, piece.length, sound.rateHz);
    buffer.copyToChannel(piece, 0);
    const source = context.createBufferSource();
    source.buffer = buffer;
    source.connect(context.destination);
    source.start((this.origin + this.next) / context.sampleRate);
    source.onended = () => {
      this.sources.delete(source);
      if (this.sources.size) return;
      if (sound.done && this.next >= sound.length) this.stop();
      else this.pump();
    };
    this.sources.add(source);
    this.next = sound.length;
  }

  // Whether what is there, and what is made meanwhile, will last to the end.
  lasts() {
    const { sound, next } = this;
    const ready = (sound.length - next) / sound.rateHz;
    if (sound.done) return ready > 0;
    const left = (sound.nWanted - next) / sound.rateHz;
    return ready > 0 && ready >= Math.min(left, left * (1 - sound.pace) + SPARE_S * (sound.pace < 2));
  }

  setState(state) {
    if (state === this.state) return;
    this.state = state;
    this.onChange?.();
  }
}

// A 16-bit WAV file, one channel.
export function wavOf(samples, rateHz) {
  const header = new DataView(new ArrayBuffer(44));
  const text = (at, word) => [...word].forEach((c, i) => header.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  header.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  header.setUint32(16, 16, true);
  header.setUint16(20, 1, true); // PCM
  header.setUint16(22, 1, true); // one channel
  header.setUint32(24, rateHz, true);
  header.setUint32(28, 2 * rateHz, true);
  header.setUint16(32, 2, true);
  header.setUint16(34, 16, true);
  text(36, "data");
  header.setUint32(40, 2 * samples.length, true);
  return new Blob([header.buffer, samples], { type: "audio/wav" });
}
