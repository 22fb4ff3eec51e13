// Continue token ids with ONNX Runtime in Node.js: node with_node.mjs FOLDER 504 3629
import * as ort from "onnxruntime-node";

const [folder, ...given] = process.argv.slice(2);
const session = await ort.InferenceSession.create(`${folder}/model.onnx`);
const past = session.inputMetadata.filter((one) => one.name.startsWith("past"));
const caches = past.map(({ name, shape: [, heads, , size] }) =>
  [name, new ort.Tensor("float32", new Float32Array(), [1, heads, 0, size])]);
let cache = Object.fromEntries(caches);
const integers = (values) => new ort.Tensor("int64", values.map(BigInt), [1, values.length]);
const tokens = given.map(Number);
let step = [...tokens];
for (let count = 0; count < 20; count++) {
  const places = tokens.map((_, place) => place);
  const outputs = await session.run({
    input_ids: integers(step),
    attention_mask: integers(tokens.map(() => 1)),
    position_ids: integers(places.slice(-step.length)),
    ...cache,
  });
  const last = outputs.logits.data.slice(-outputs.logits.dims[2]);
  step = [last.indexOf(Math.max(...last))];
  tokens.push(...step);
  cache = Object.fromEntries(
    past.map(({ name }) => [name, outputs[name.replace("past_key_values", "present")]]));
}
console.log(tokens.join(" "));
