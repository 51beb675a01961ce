// OpenAI's SDK for Node against a server: each case prints one line of JSON, what it saw or how it failed.
// node openai_node.mjs URL SDK: where the server is, and the module of the SDK.
const [url, sdk] = process.argv.slice(2);
const { default: OpenAI } = await import(sdk);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });

const messages = [{ role: "user", content: "Hello" }];
const weather = {
  name: "weather",
  description: "The weather in a city.",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
};
const askWeather = [{ role: "user", content: "The weather?" }];
const place = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };

const cases = {
  async chat() {
    const { data, response } = await client.chat.completions.create({ model: "scripted", messages }).withResponse();
    const [choice] = data.choices;
    return [choice.message.content, choice.finish_reason, choice.message.refusal, response.headers.get("x-llm")];
  },
  async chat_stream() {
    let text = "";
    const finish = [];
    for await (const chunk of await client.chat.completions.create({ model: "scripted", messages, stream: true })) {
      text += chunk.choices[0].delta.content ?? "";
      if (chunk.choices[0].finish_reason) finish.push(chunk.choices[0].finish_reason);
    }
    return [text, finish];
  },
  async chat_stream_with_usage() {
    const stream = client.chat.completions.stream({
      model: "scripted",
      messages,
      stream_options: { include_usage: true },
    });
    const whole = await stream.finalChatCompletion();
    return [whole.choices[0].message.content, whole.usage.total_tokens > 0];
  },
  async chat_tool() {
    const tools = [{ type: "function", function: weather }];
    const answer = await client.chat.completions.create({ model: "scripted", messages: askWeather, tools });
    const [choice] = answer.choices;
    const [call] = choice.message.tool_calls;
    return [choice.finish_reason, call.function.name, JSON.parse(call.function.arguments)];
  },
  async chat_run_tools() {
    const run = async ({ city }) => `It is 21 C in ${city}`;
    const runner = client.chat.completions.runTools({
      model: "scripted",
      stream: true,
      messages: askWeather,
      tools: [{ type: "function", function: { ...weather, function: run, parse: JSON.parse } }],
    });
    return await runner.finalContent();
  },
  async chat_schema() {
    const answer = await client.chat.completions.parse({
      model: "scripted",
      messages: [{ role: "user", content: "A place." }],
      response_format: { type: "json_schema", json_schema: { name: "place", schema: place, strict: true } },
    });
    return answer.choices[0].message.parsed;
  },
  async chat_role() {
    const said = [{ role: "user", content: JSON.stringify({ text: "Hello", instructions: "shorter" }) }];
    const answer = await client.chat.completions.create({ model: "productivity/rewrite", messages: said });
    return [answer.model, answer.choices[0].message.content];
  },
  async chat_leaves() {
    const stream = await client.chat.completions.create({ model: "slow", messages, stream: true });
    let chunks = 0;
    for await (const _ of stream) {
      chunks += 1;
      if (chunks === 2) stream.controller.abort();
    }
    const free = await client.chat.completions.create({ model: "slow", messages, max_tokens: 1 });
    return [chunks, free.choices[0].finish_reason];
  },
  async responses() {
    const answer = await client.responses.create({ model: "scripted", input: "Hello" });
    return [answer.status, answer.output_text];
  },
  async responses_stream() {
    const stream = client.responses.stream({ model: "scripted", input: "Hello" });
    let text = "";
    for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
    const last = await stream.finalResponse();
    return [last.status, text, last.output_text];
  },
  async responses_tool() {
    const tools = [{ type: "function", ...weather, strict: false }];
    const answer = await client.responses.create({ model: "scripted", input: "The weather?", tools });
    const call = answer.output.find((item) => item.type === "function_call");
    return [call.name, JSON.parse(call.arguments)];
  },
  async responses_schema() {
    const text = { format: { type: "json_schema", name: "place", schema: place, strict: true } };
    const answer = await client.responses.parse({ model: "scripted", input: "A place.", text });
    return answer.output_parsed;
  },
  async embeddings() {
    const one = await client.embeddings.create({ model: "vectors", input: ["one", "two"] });
    const same = await client.embeddings.create({ model: "vectors", input: ["one"], encoding_format: "float" });
    const close = one.data[0].embedding.every((value, at) => Math.abs(value - same.data[0].embedding[at]) < 1e-6);
    return [one.data.map((row) => row.index), close, one.usage.prompt_tokens > 0];
  },
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    return [ids.includes("scripted"), (await client.models.retrieve("developer/planner")).id];
  },
  async error_of_an_unknown_model() {
    return await failing(() => client.chat.completions.create({ model: "nobody", messages }));
  },
  async error_of_a_wrong_request() {
    return await failing(() => client.chat.completions.create({ model: "scripted", messages: [] }));
  },
  async error_of_an_engine() {
    return await failing(() => client.chat.completions.create({ model: "down", messages }));
  },
  async error_within_a_stream() {
    return await failing(async () => {
      for await (const _ of await client.chat.completions.create({ model: "broken", messages, stream: true }));
    });
  },
  async error_within_responses() {
    const stream = await client.responses.create({ model: "broken", input: "Hello", stream: true });
    let last;
    for await (const event of stream) last = event;
    return [last.type, last.response.error.code];
  },
};

async function failing(ask) {
  try {
    await ask();
  } catch (error) {
    return [error.constructor.name, error.status ?? null, error.code ?? null, error.param ?? null];
  }
  return "did not fail";
}

for (const [name, run] of Object.entries(cases)) {
  let told;
  try {
    told = { saw: await run() };
  } catch (error) {
    told = { failed: `${error.constructor.name}: ${error.message}` };
  }
  console.log(JSON.stringify({ case: name, ...told }));
}
