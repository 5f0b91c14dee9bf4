/** The request as a person would send it: text that a shell or Python reads back exactly. */

import { BASE, generateBody, stopStrings } from "./state.js";

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A Python literal; JSON's strings are Python's too. */
const python = (value) => (value === null ? "None" : JSON.stringify(value));

/** `url`: of POST /generate; `locked`: whether the server wants a key. */
export function curl(state, voice, url, locked) {
  const key = locked ? ` \\\n  -H "Authorization: Bearer $CHORUS_API_KEY"` : "";
  const body = shell(JSON.stringify(generateBody(state, voice), null, 2));
  return `curl -s ${shell(url)} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${body}\n`;
}

/** `url`: of /v1; `base`: the base model's name, null if it is not known. */
export function openai(state, voice, url, locked, base) {
  const extra = {};
  if (state.sampled && state.top_k > 0) extra.top_k = state.top_k;
  if (state.repetition_penalty !== 1) extra.repetition_penalty = state.repetition_penalty;
  const fields = [
    ["model", voice === BASE ? base : voice],
    ["prompt", state.prompt],
    ["max_tokens", state.max_tokens],
    ["temperature", state.sampled ? state.temperature : 0],
    ["top_p", state.sampled && state.top_p < 1 ? state.top_p : undefined],
    ["seed", state.sampled ? state.seed : undefined],
    ["stop", stopStrings(state).length ? stopStrings(state) : undefined],
    ["extra_body", Object.keys(extra).length ? extra : undefined],
  ];
  const lines = fields.filter(([, value]) => value !== undefined).map(([name, value]) => `    ${name}=${python(value)},\n`);
  return [
    locked ? "import os\n\n" : "",
    "from openai import OpenAI\n\n",
    `client = OpenAI(base_url=${python(url)}, api_key=${locked ? 'os.environ["CHORUS_API_KEY"]' : '"none"'})\n`,
    `completion = client.completions.create(\n${lines.join("")})\n`,
    "print(completion.choices[0].text)\n",
  ].join("");
}
