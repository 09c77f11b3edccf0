// The player of `wgpt serve`: plays PCM while it arrives, then offers it as a WAV.
//
// Runs once per page as gradio's `js_on_load` (element, props, watch are its names). The value is
// {job, pcm, rate_hz, done}: pcm is base64 of all 16-bit samples so far (gradio sends only what was
// appended), so an update that the page skips loses nothing. element.dataset tells what happened.

const FIRST_LEAD_S = 0.15; // sound scheduled this far ahead survives a late update
const MOST_LEAD_S = 2.4; // each gap doubles the lead, up to this
const note = element.querySelector(".note");
const meter = element.querySelector("canvas");
const whole = element.querySelector("audio");
const save = element.querySelector("a");

let context = null;
let analyser = null;
let job = null;
let samples = []; // Int16Array pieces
let nReceived = 0;
let nCharacters = 0; // of pcm, already decoded
let nextTime = 0; // when the next piece starts, in the context's seconds
let sources = [];
let leadS = FIRST_LEAD_S;
let rateHz = 24000;
let finished = false;

// A page may make sound only after the user touched it: the button's click calls this.
window.wgptStart = () => {
  stopSound();
  context = context || new AudioContext();
  if (!analyser) {
    analyser = context.createAnalyser();
    analyser.fftSize = 1024;
    analyser.connect(context.destination);
    requestAnimationFrame(drawMeter);
  }
  context.resume();
  whole.pause();
  whole.hidden = save.hidden = true;
  meter.hidden = false;
  note.textContent = "Listening for the first sound …";
  finished = false;
  nReceived = 0;
  element.dataset.state = "waiting";
};

window.wgptStop = () => {
  stopSound();
  if (nReceived && !finished) finish();
};

// The job ended before its time: it was refused, failed, or is over because of Stop.
window.wgptFail = () => {
  stopSound();
  if (finished) {
    element.dataset.state = "stopped";
    return;
  }
  meter.hidden = true;
  note.textContent = "Nothing was made.";
  element.dataset.state = "failed";
};

function stopSound() {
  for (const source of sources) source.stop();
  sources = [];
}

function begin(value) {
  stopSound();
  job = value.job;
  rateHz = value.rate_hz;
  samples = [];
  nReceived = nCharacters = nextTime = 0;
  leadS = FIRST_LEAD_S;
  finished = false;
}

function receive(pcm) {
  // A piece is a whole number of samples and of base64's groups of 3 bytes, except the last.
  const bytes = atob(pcm.slice(nCharacters));
  nCharacters = pcm.length;
  const view = new DataView(new ArrayBuffer(bytes.length));
  for (let i = 0; i < bytes.length; i++) view.setUint8(i, bytes.charCodeAt(i));
  const piece = new Int16Array(bytes.length / 2);
  for (let i = 0; i < piece.length; i++) piece[i] = view.getInt16(2 * i, true);
  samples.push(piece);
  nReceived += piece.length;
  element.dataset.receivedSamples = nReceived;
  if (context) schedule(piece);
}

function schedule(piece) {
  const buffer = context.createBuffer(1, piece.length, rateHz);
  buffer.copyToChannel(Float32Array.from(piece, (sample) => sample / 32768), 0);
  const source = context.createBufferSource();
  source.buffer = buffer;
  source.connect(analyser);
  if (nextTime < context.currentTime) {
    if (nextTime) leadS = Math.min(2 * leadS, MOST_LEAD_S);
    nextTime = context.currentTime + leadS;
  }
  source.start(nextTime);
  nextTime += buffer.duration;
  sources.push(source);
  source.onended = () => {
    sources = sources.filter((other) => other !== source);
    if (!sources.length && finished) showWhole();
  };
}

function finish() {
  finished = true;
  element.dataset.state = "done";
  if (whole.src) URL.revokeObjectURL(whole.src);
  whole.src = save.href = URL.createObjectURL(new Blob(wav(), { type: "audio/wav" }));
  save.hidden = false;
  if (!sources.length) showWhole();
}

function showWhole() {
  meter.hidden = true;
  whole.hidden = false;
  note.textContent = `${(nReceived / rateHz).toFixed(1)} s`;
}

function wav() {
  const header = new DataView(new ArrayBuffer(44));
  const text = (at, word) => [...word].forEach((c, i) => header.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  header.setUint32(4, 36 + 2 * nReceived, true);
  text(8, "WAVEfmt ");
  header.setUint32(16, 16, true);
  header.setUint16(20, 1, true); // PCM
  header.setUint16(22, 1, true); // one channel
  header.setUint32(24, rateHz, true);
  header.setUint32(28, 2 * rateHz, true);
  header.setUint16(32, 2, true);
  header.setUint16(34, 16, true);
  text(36, "data");
  header.setUint32(40, 2 * nReceived, true);
  return [header.buffer, ...samples];
}

function drawMeter() {
  requestAnimationFrame(drawMeter);
  if (meter.hidden) return;
  const pen = meter.getContext("2d");
  const wave = new Float32Array(analyser.fftSize);
  analyser.getFloatTimeDomainData(wave);
  element.dataset.peak = Math.max(
    Number(element.dataset.peak || 0),
    wave.reduce((peak, sample) => Math.max(peak, Math.abs(sample)), 0),
  );
  pen.clearRect(0, 0, meter.width, meter.height);
  pen.strokeStyle = "#f97316";
  pen.lineWidth = 2;
  pen.beginPath();
  for (let i = 0; i < wave.length; i++) {
    pen.lineTo((i / wave.length) * meter.width, (0.5 - 0.48 * wave[i]) * meter.height);
  }
  pen.stroke();
  if (sources.length) {
    const left = Math.max(0, nextTime - context.currentTime);
    const played = Math.max(0, nReceived / rateHz - left);
    const made = (nReceived / rateHz).toFixed(1);
    note.textContent = `Playing ${played.toFixed(1)} of ${made} s${finished ? "" : " so far"}`;
  }
}

watch("value", () => {
  const value = props.value;
  if (!value || !value.job) return;
  if (value.job !== job) begin(value);
  if (value.pcm.length > nCharacters) {
    element.dataset.state = "playing";
    receive(value.pcm);
  }
  if (value.done && !finished) finish();
});
