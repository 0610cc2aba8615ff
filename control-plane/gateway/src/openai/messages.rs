//! Chat messages and tools as OpenAI clients send them, brought into the form that chat
//! templates expect.

use serde_json::{Map, Value};

use super::fields::{Fields, kind_of};
use crate::error::ApiError;

/// More messages than any real conversation; each costs template time.
const MAX_MESSAGES: usize = 10_000;
const MAX_TOOLS: usize = 1_024;

/// Checks `messages` and brings them into template form: text parts joined, `developer` as
/// `system`, arguments of tool calls as objects.
pub(crate) fn read_messages(fields: Fields<'_>) -> Result<Vec<Value>, ApiError> {
    fields.required("messages")?;
    let messages = fields.array("messages")?.unwrap_or_default();
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        let problem = format!("must hold between 1 and {MAX_MESSAGES} messages");
        return Err(fields.error("messages", &problem));
    }
    messages
        .iter()
        .enumerate()
        .map(|(i, message)| read_message(message, &format!("messages[{i}]")))
        .collect()
}

fn read_message(message: &Value, path: &str) -> Result<Value, ApiError> {
    let object = as_object(message, path)?;
    let fields = Fields::new(object, path);
    let role = match fields.required_str("role")? {
        // Templates know the older name of the same thing.
        "developer" => "system",
        role @ ("system" | "user" | "assistant" | "tool" | "function") => role,
        _ => {
            return Err(fields.error(
                "role",
                "must be one of developer, system, user, assistant, tool, function",
            ));
        }
    };
    let calls = read_tool_calls(fields)?;
    let content = match fields.get("content") {
        None if role == "assistant" => None,
        None => return Err(fields.error("content", "is required")),
        Some(content) => Some(read_content(fields, content)?),
    };
    let mut read = object.clone();
    // A client's nulls (`"refusal": null` of an earlier answer) only confuse templates, as does an
    // empty list of calls.
    read.retain(|key, value| !value.is_null() && (key != "tool_calls" || !calls.is_empty()));
    read.insert("role".into(), role.into());
    // Templates concatenate it: absent content is an empty text.
    read.insert("content".into(), content.unwrap_or_default().into());
    if !calls.is_empty() {
        read.insert("tool_calls".into(), calls.into());
    }
    Ok(Value::Object(read))
}

/// A text, or text parts joined by line breaks.
fn read_content(fields: Fields<'_>, content: &Value) -> Result<String, ApiError> {
    if let Some(text) = content.as_str() {
        return Ok(text.to_owned());
    }
    let Some(parts) = content.as_array() else {
        let problem = format!("must be a string or an array, not {}", kind_of(content));
        return Err(fields.error("content", &problem));
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let path = format!("{}[{i}]", fields.path("content"));
        let part = Fields::new(as_object(part, &path)?, &path);
        match part.required_str("type")? {
            "text" => {
                part.required("text")?;
                texts.push(part.str("text")?.unwrap_or_default().to_owned());
            }
            "refusal" => texts.push(part.str("refusal")?.unwrap_or_default().to_owned()),
            _ => {
                return Err(part.error("type", "must be `text`: the models served here read text"));
            }
        }
    }
    Ok(texts.join("\n"))
}

fn read_tool_calls(fields: Fields<'_>) -> Result<Vec<Value>, ApiError> {
    let calls = fields.array("tool_calls")?.unwrap_or_default();
    let read = |(i, call): (usize, &Value)| {
        let path = format!("{}[{i}]", fields.path("tool_calls"));
        let call = as_object(call, &path)?;
        let call_fields = Fields::new(call, &path);
        let path = call_fields.path("function");
        call_fields.required("function")?;
        let function = call_fields.object("function")?;
        let function = function.ok_or_else(|| call_fields.error("function", "is required"))?;
        let function_fields = Fields::new(function, &path);
        function_fields.required_str("name")?;
        let mut function = function.clone();
        // OpenAI sends the arguments as JSON in a string, templates want what it says.
        if let Some(arguments) = function_fields.get("arguments").and_then(Value::as_str)
            && let Ok(object) = serde_json::from_str::<Map<String, Value>>(arguments)
        {
            function.insert("arguments".into(), Value::Object(object));
        }
        let mut call = call.clone();
        call.insert("function".into(), Value::Object(function));
        Ok(Value::Object(call))
    };
    calls.iter().enumerate().map(read).collect()
}

/// Checks `tools` against `tool_choice`; empty when the model shall not see any.
pub(crate) fn read_tools(fields: Fields<'_>) -> Result<Vec<Value>, ApiError> {
    let tools = fields.array("tools")?.unwrap_or_default();
    if tools.len() > MAX_TOOLS {
        let problem = format!("may hold at most {MAX_TOOLS} tools");
        return Err(fields.error("tools", &problem));
    }
    for (i, tool) in tools.iter().enumerate() {
        let path = format!("tools[{i}]");
        let tool = Fields::new(as_object(tool, &path)?, &path);
        if tool.required_str("type")? != "function" {
            return Err(tool.error("type", "must be `function`"));
        }
        tool.required("function")?;
        let path = tool.path("function");
        if let Some(function) = tool.object("function")? {
            let function = Fields::new(function, &path);
            function.required_str("name")?;
            function.str("description")?;
            function.object("parameters")?;
        }
    }
    match fields.get("tool_choice") {
        None => Ok(tools.to_vec()),
        Some(choice) if choice == "auto" => Ok(tools.to_vec()),
        Some(choice) if choice == "none" => Ok(Vec::new()),
        Some(_) => {
            Err(fields.error("tool_choice", "must be `auto` or `none`: a call can't be forced"))
        }
    }
}

fn as_object<'a>(value: &'a Value, path: &str) -> Result<&'a Map<String, Value>, ApiError> {
    value.as_object().ok_or_else(|| {
        ApiError::invalid(path, format!("`{path}` must be an object, not {}", kind_of(value)))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[allow(clippy::needless_pass_by_value, reason = "literals read better")]
    fn read(messages: Value) -> Result<Vec<Value>, ApiError> {
        let request = json!({"messages": messages});
        read_messages(Fields::new(request.as_object().unwrap(), ""))
    }

    #[test]
    fn brings_messages_into_template_form() {
        let messages = read(json!([
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"},
                                         {"type": "text", "text": "b"}], "name": "ann"},
            {"role": "assistant", "content": null, "refusal": null, "tool_calls": [
                {"id": "call_1", "type": "function",
                 "function": {"name": "add", "arguments": "{\"x\": 1}"}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        ]))
        .unwrap();
        assert_eq!(
            messages,
            [
                json!({"role": "system", "content": "Be brief."}),
                json!({"role": "user", "content": "a\nb", "name": "ann"}),
                json!({"role": "assistant", "content": "",
                       "tool_calls": [{"id": "call_1", "type": "function",
                            "function": {"name": "add", "arguments": {"x": 1}}}]}),
                json!({"role": "tool", "tool_call_id": "call_1", "content": "2"}),
            ]
        );
    }

    #[test]
    fn names_the_field_at_fault() {
        let check = |messages: Value, param: &str| {
            let error = read(messages).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{}", error.message);
        };
        check(json!(null), "messages");
        check(json!([]), "messages");
        check(json!("hi"), "messages");
        check(json!(["hi"]), "messages[0]");
        check(json!([{"content": "x"}]), "messages[0].role");
        check(json!([{"role": "boss", "content": "x"}]), "messages[0].role");
        check(json!([{"role": "user"}]), "messages[0].content");
        check(json!([{"role": "user", "content": 1}]), "messages[0].content");
        check(
            json!([{"role": "user", "content": [{"type": "text", "text": "x"},
                                                {"type": "image_url", "image_url": {}}]}]),
            "messages[0].content[1].type",
        );
        check(
            json!([{"role": "assistant", "tool_calls": [{"id": "x"}]}]),
            "messages[0].tool_calls[0].function",
        );
    }

    #[test]
    fn tools_are_checked_and_can_be_switched_off() {
        let tools = json!([{"type": "function", "function": {"name": "add"}}]);
        let read = |tools: &Value, choice: Value| {
            let request = json!({"tools": tools, "tool_choice": choice});
            read_tools(Fields::new(request.as_object().unwrap(), ""))
        };
        assert_eq!(read(&tools, json!(null)).unwrap().len(), 1);
        assert_eq!(read(&tools, json!("auto")).unwrap().len(), 1);
        assert_eq!(read(&tools, json!("none")).unwrap().len(), 0);
        let param = |result: Result<Vec<Value>, ApiError>| result.unwrap_err().param.unwrap();
        assert_eq!(param(read(&tools, json!("required"))), "tool_choice");
        assert_eq!(
            param(read(&json!([{"type": "function", "function": {}}]), json!(null))),
            "tools[0].function.name"
        );
        assert_eq!(param(read(&json!([{"type": "retrieval"}]), json!(null))), "tools[0].type");
    }
}
