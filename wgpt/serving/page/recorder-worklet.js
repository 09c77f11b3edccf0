// Hands the microphone's samples to the page in blocks of 2048.

class RecorderProcessor extends AudioWorkletProcessor {
  block = new Float32Array(2048);
  n = 0;

  process([[channel]]) {
    for (const sample of channel || []) {
      this.block[this.n++] = sample;
      if (this.n === this.block.length) {
        this.port.postMessage(this.block.slice());
        this.n = 0;
      }
    }
    return true;
  }
}

registerProcessor("recorder", RecorderProcessor);
