//! The output of `--print-capabilities`: the back-end's capabilities as defined in QEMU's docs/interop/vhost-user.json
//! (VHostUserBackendCapabilities). Management software reads them before it starts a VM.

use serde::Serialize;

/// Capabilities of a back-end of type `gpu`.
#[derive(Debug, Serialize)]
pub struct Capabilities {
    r#type: &'static str,
    /// The schema defines `render-node` and `virgl`, each an option of that name. MirrorGPU has neither.
    features: &'static [&'static str],
}

/// The capabilities of MirrorGPU.
pub const CAPABILITIES: Capabilities = Capabilities { r#type: "gpu", features: &[] };

impl Capabilities {
    /// As JSON, on one line.
    pub fn json(&self) -> String {
        serde_json::json!(self).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_follow_the_schema() {
        let json: serde_json::Value = serde_json::from_str(&CAPABILITIES.json()).unwrap();
        assert_eq!(json, serde_json::json!({"type": "gpu", "features": []}));
    }

    /// The file for management software names the same type, and the binary by an absolute path.
    #[test]
    fn the_installed_description_follows_the_schema() {
        let file = include_str!("../resources/50-mirrorgpu.json");
        let json: serde_json::Value = serde_json::from_str(file).unwrap();
        let fields: Vec<_> = json.as_object().unwrap().keys().collect();
        assert_eq!(fields, ["binary", "description", "type"]);
        assert_eq!(json["type"], CAPABILITIES.r#type);
        assert!(json["binary"].as_str().unwrap().starts_with('/'));
    }
}
