// The routes of the server.

export const facts = await (await fetch("/facts")).json();
export const names = Object.keys(facts.models);

// Raises an Error with the server's own words; file: undefined gets, null posts nothing.
export async function ask(path, parameters, file, signal) {
  const query = new URLSearchParams(parameters);
  const options = file === undefined ? {} : { method: "POST", body: file || "" };
  const answer = await fetch(`${path}?${query}`, { ...options, signal }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is wgpt serve still running?");
  });
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

// The values of an answer that arrives line by line.
export async function* linesOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

export function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0)).buffer;
}
