/* Sends form data and yields the JSON lines of the answer as they come. Knows nothing of the page. */

export class StreamProblem extends Error {}

export async function* jsonLines(address, body, signal) {
  let response;
  try {
    response = await fetch(address, { method: "POST", body, signal, headers: { Accept: "application/x-ndjson" } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new StreamProblem("The studio cannot be reached. Check that it is running, then send again.");
  }
  if (response.redirected) throw new StreamProblem("You were signed out. Reload the page and sign in; your prompt stays in the box until then.");
  if (!response.ok) throw new StreamProblem(await sentenceOf(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await read(reader);
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new StreamProblem("The connection was lost while the models answered. Send again.");
  }
}

async function sentenceOf(response) {
  try {
    return (await response.json()).text;
  } catch {
    return response.status === 403
      ? "This page was open for too long. Reload it and send again."
      : `The studio answered with an error (${response.status}). Reload the page and send again.`;
  }
}
