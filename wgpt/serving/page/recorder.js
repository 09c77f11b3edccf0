// The microphone as a WAV, unprocessed, at the rate the machine records at.

import { wavOf } from "/player.js";

export class Recorder {
  // onProgress(seconds, peak) with every block of sound.
  async start(onProgress) {
    const stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false },
    });
    const context = new AudioContext();
    await context.audioWorklet.addModule("/recorder-worklet.js");
    const node = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
    const blocks = [];
    let n = 0;
    node.port.onmessage = ({ data }) => {
      blocks.push(data);
      n += data.length;
      onProgress(n / context.sampleRate, data.reduce((p, s) => Math.max(p, Math.abs(s)), 0));
    };
    context.createMediaStreamSource(stream).connect(node);
    this.stop = async () => {
      for (const track of stream.getTracks()) track.stop();
      const rateHz = context.sampleRate;
      await context.close();
      const samples = new Int16Array(n);
      let at = 0;
      for (const block of blocks) {
        for (const s of block) samples[at++] = Math.round(Math.max(-1, Math.min(1, s)) * 32767);
      }
      return wavOf(samples, rateHz);
    };
  }
}
