// A sound as waveform and log-mel on a canvas, with axes in seconds and Hz and a bar in decibels.

const RANGE_DB = 50; // below the loudest column of the prompt
const TICKS_HZ = [100, 200, 500, 1000, 2000, 4000, 8000];
const STEPS_S = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20];
const LEFT = 46, RIGHT = 52, TOP = 6, BOTTOM = 20, WAVE = 52, GAP = 8; // CSS pixels
const LABEL = 13; // least distance of two labels
// matplotlib's magma at ninths.
const MAGMA = "000004 180f3e 451077 721f81 9f2f7f cd4071 f1605d fd9567 feca8d fcfdbf"
  .split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));

function magma(share) {
  const at = Math.max(0, Math.min(1, share)) * (MAGMA.length - 1);
  const low = Math.min(Math.floor(at), MAGMA.length - 2);
  return MAGMA[low].map((value, i) => value + (at - low) * (MAGMA[low + 1][i] - value));
}

export class Picture {
  // edgesHz: borders of the mel bands; nPrompt: steps of the prompt, drawn in another colour;
  // topDb, peak: level and sample that reach the top of the scales.
  constructor(canvas, sound, { stepSamples, edgesHz, nPrompt, topDb, peak }) {
    Object.assign(this, { canvas, sound, stepSamples, edgesHz, nPrompt, topDb, peak });
    this.nSteps = Math.max(1, Math.round(sound.nWanted / stepSamples));
    this.nBands = edgesHz.length - 2;
    this.image = new OffscreenCanvas(this.nSteps, this.nBands);
    this.nDrawn = 0;
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  // columns: Int8Array, the decibels of every band, step after step.
  push(columns) {
    const n = columns.length / this.nBands;
    if (!n) return;
    const pixels = new ImageData(n, this.nBands);
    columns.forEach((db, i) => {
      const x = Math.floor(i / this.nBands), y = this.nBands - 1 - (i % this.nBands);
      pixels.data.set([...magma(1 + (db - this.topDb) / RANGE_DB), 255], 4 * (y * n + x));
    });
    this.image.getContext("2d").putImageData(pixels, this.nDrawn, 0);
    this.nDrawn += n;
  }

  get width() {
    return this.canvas.clientWidth - LEFT - RIGHT;
  }

  // CSS pixels from the canvas's left edge of a sample, and back.
  xOf(sample) {
    return LEFT + (sample / (this.nSteps * this.stepSamples)) * this.width;
  }

  sampleAt(x) {
    return Math.round(((x - LEFT) / this.width) * this.nSteps * this.stepSamples);
  }

  draw() {
    const { canvas, sound } = this;
    const scale = devicePixelRatio;
    const [w, h] = [canvas.clientWidth, canvas.clientHeight];
    if (!w) return;
    canvas.width = w * scale;
    canvas.height = h * scale;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const style = getComputedStyle(canvas);
    const colour = (name) => style.getPropertyValue(`--${name}`);
    pen.font = `11px ${style.fontFamily}`;

    const melTop = TOP + WAVE + GAP, melHeight = h - melTop - BOTTOM;
    pen.fillStyle = "#000004";
    pen.fillRect(LEFT, melTop, this.width, melHeight);
    pen.imageSmoothingEnabled = this.width < this.nSteps;
    pen.drawImage(this.image, LEFT, melTop, this.width, melHeight);
    this.drawWave(pen, colour);
    this.drawTime(pen, colour, h - BOTTOM);
    this.drawBands(pen, colour, melTop, melHeight);
    this.drawBar(pen, colour, melTop, melHeight);
    if (this.nPrompt && this.nPrompt < this.nSteps) {
      pen.fillStyle = colour("faint");
      pen.fillRect(this.xOf(this.nPrompt * this.stepSamples), TOP, 1, WAVE);
      pen.fillStyle = "#fff8";
      pen.fillRect(this.xOf(this.nPrompt * this.stepSamples), melTop, 1, melHeight);
    }
    canvas.dataset.samples = sound.length; // what is drawn, for who cannot see it
  }

  drawWave(pen, colour) {
    const middle = TOP + WAVE / 2;
    pen.fillStyle = colour("line");
    pen.fillRect(LEFT, middle, this.width, 1);
    const nColumns = Math.max(1, Math.floor(this.width));
    const end = this.nSteps * this.stepSamples;
    for (let i = 0; i < nColumns; i++) {
      const first = Math.floor((i * end) / nColumns);
      const last = Math.min(Math.floor(((i + 1) * end) / nColumns), this.sound.length);
      if (first >= last) break;
      let low = 0, high = 0;
      for (let s = first; s < last; s++) {
        const sample = this.sound.samples[s];
        if (sample < low) low = sample;
        if (sample > high) high = sample;
      }
      pen.fillStyle = colour(first < this.nPrompt * this.stepSamples ? "prompt" : "accent");
      const y = (sample) => middle - Math.max(-1, Math.min(1, sample / this.peak)) * (WAVE / 2);
      pen.fillRect(LEFT + i, y(high), 1, Math.max(1, y(low) - y(high)));
    }
  }

  drawTime(pen, colour, y) {
    const perSecond = this.sound.rateHz / this.stepSamples;
    const nBefore = this.nPrompt < this.nSteps ? this.nPrompt : 0; // time 0 is the prompt's end
    const step = STEPS_S.find((s) => (s * perSecond * this.width) / this.nSteps >= 44) || 60;
    const first = -nBefore / perSecond, last = first + this.nSteps / perSecond;
    pen.fillStyle = colour("faint");
    pen.textBaseline = "top";
    pen.textAlign = "center";
    for (let i = Math.ceil(first / step); i * step <= last + 1e-9; i++) {
      const x = this.xOf((i * step - first) * this.sound.rateHz);
      pen.fillRect(x, y, 1, 3);
      if (x < LEFT + this.width - 8) pen.fillText(`${+(i * step).toFixed(1)}`, x, y + 6);
    }
    pen.textAlign = "right";
    pen.fillText("s", LEFT + this.width + 3, y + 6);
  }

  drawBands(pen, colour, top, height) {
    pen.fillStyle = colour("faint");
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.fillText("Hz", LEFT - 8, top - GAP / 2);
    let below = top + height + LABEL / 2;
    for (const hz of TICKS_HZ) {
      const above = this.edgesHz.findIndex((edge) => edge >= hz);
      if (above < 1) continue;
      const [low, high] = [this.edgesHz[above - 1], this.edgesHz[above]];
      const band = above - 1 + (hz - low) / (high - low) - 0.5; // band m is centred on edge m + 1
      const y = top + height * (1 - band / this.nBands);
      if (y > below - LABEL || y < top + LABEL / 2) continue;
      below = y;
      pen.fillRect(LEFT - 4, y, 4, 1);
      pen.fillText(hz < 1000 ? hz : `${hz / 1000}k`, LEFT - 8, y);
    }
  }

  drawBar(pen, colour, top, height) {
    const x = LEFT + this.width + 12;
    for (let i = 0; i < height; i++) {
      pen.fillStyle = `rgb(${magma(1 - i / height).join(" ")})`;
      pen.fillRect(x, top + i, 8, 1.5);
    }
    pen.fillStyle = colour("faint");
    pen.textAlign = "left";
    pen.textBaseline = "middle";
    pen.fillText("dB", x, top - GAP / 2);
    for (let db = 0; db >= -RANGE_DB; db -= 25) {
      const y = top - (db / RANGE_DB) * height;
      pen.fillText(db === 0 ? "0" : `−${-db}`, x + 11, Math.max(top + 5, Math.min(y, top + height - 5)));
    }
  }
}
