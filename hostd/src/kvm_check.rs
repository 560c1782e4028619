//! Whether this machine can run servers, and if not, what to do about it.

use std::{fs, io, os::fd::AsRawFd, path::Path};

use serde::Serialize;

/// The KVM device.
pub const KVM_DEVICE: &str = "/dev/kvm";
/// The only version of KVM's API that there is (Documentation/virt/kvm/api.rst, KVM_GET_API_VERSION).
const KVM_API_VERSION: i32 = 12;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum KvmStatus {
    /// KVM works, with hardware virtualization.
    Ready {
        /// `vmx` or `svm`.
        feature: String,
    },
    /// KVM works, but the processor shows neither VMX nor SVM: guest kernels are emulated, ordinary systems don't boot.
    NoHardwareVirtualization,
    /// There is no /dev/kvm.
    Missing {
        /// The processor's feature, if it has one.
        feature: Option<String>,
    },
    /// /dev/kvm may not be opened.
    NoPermission,
    /// /dev/kvm is there but does not do what KVM does.
    Unusable {
        /// What failed.
        problem: String,
    },
}

impl KvmStatus {
    /// Servers of some kind can run.
    pub fn works(&self) -> bool {
        matches!(self, Self::Ready { .. } | Self::NoHardwareVirtualization)
    }

    /// OpenStack's names of what the host can do.
    pub fn traits(&self) -> Vec<String> {
        match self {
            Self::Ready { feature } => {
                let by_processor = if feature == "svm" { "HW_CPU_X86_SVM" } else { "HW_CPU_X86_VMX" };
                ["CUSTOM_KVM", "CUSTOM_HW_VIRTUALIZATION", by_processor].map(str::to_owned).to_vec()
            }
            Self::NoHardwareVirtualization => vec!["CUSTOM_KVM".to_owned()],
            _ => Vec::new(),
        }
    }

    /// What is wrong and what to do, for a person; empty when all is well.
    pub fn message(&self) -> String {
        match self {
            Self::Ready { .. } => String::new(),
            Self::NoHardwareVirtualization => format!(
                "{KVM_DEVICE} works, but this machine has no hardware virtualization (no vmx or svm in /proc/cpuinfo): only \
                 guests that were made for it run here. If it is a virtual machine, switch on nested virtualization on its \
                 host; if it is a real one, switch on VT-x or AMD-V in its firmware."
            ),
            Self::Missing { feature: Some(feature) } => format!(
                "{KVM_DEVICE} is missing, though the processor has {feature}: load the module (`modprobe {}`), or in a \
                 container pass the device in (`--device {KVM_DEVICE}`).",
                if feature == "svm" { "kvm_amd" } else { "kvm_intel" }
            ),
            Self::Missing { feature: None } => format!(
                "{KVM_DEVICE} is missing, and the processor shows neither vmx nor svm: switch on VT-x or AMD-V in the \
                 firmware (for a virtual machine: nested virtualization on its host), then load kvm_intel or kvm_amd."
            ),
            Self::NoPermission => format!(
                "{KVM_DEVICE} may not be opened: run as root, or add the user to the group that owns it (usually `kvm`); in \
                 a container, allow the device."
            ),
            Self::Unusable { problem } => format!(
                "{KVM_DEVICE} is there but not usable ({problem}): see `dmesg | grep -i kvm`; another hypervisor may hold \
                 the processor's virtualization, or the device may be something else."
            ),
        }
    }
}

/// Looks at this machine.
pub fn check() -> KvmStatus {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    check_device(Path::new(KVM_DEVICE), virtualization_feature(&cpuinfo))
}

/// `vmx` or `svm`, if the processor shows one.
fn virtualization_feature(cpuinfo: &str) -> Option<String> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?.split_once(':')?.1;
    flags.split_ascii_whitespace().find(|flag| matches!(*flag, "vmx" | "svm")).map(str::to_owned)
}

fn check_device(path: &Path, feature: Option<String>) -> KvmStatus {
    let unusable = |problem: String| KvmStatus::Unusable { problem };
    let device = match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(device) => device,
        Err(e) => {
            return match e.kind() {
                io::ErrorKind::NotFound => KvmStatus::Missing { feature },
                io::ErrorKind::PermissionDenied => KvmStatus::NoPermission,
                _ => unusable(format!("open: {e}")),
            };
        }
    };
    // SAFETY: the descriptor is open and handed over; `Kvm` closes it. Whether it is KVM is found out by its ioctls,
    // which touch no memory of ours.
    let kvm = unsafe {
        use std::os::fd::{FromRawFd, IntoRawFd};
        kvm_ioctls::Kvm::from_raw_fd(device.into_raw_fd())
    };
    debug_assert!(kvm.as_raw_fd() >= 0);
    let version = kvm.get_api_version();
    if version < 0 {
        return unusable(format!("KVM_GET_API_VERSION: {}", io::Error::last_os_error()));
    }
    if version != KVM_API_VERSION {
        return unusable(format!("KVM_GET_API_VERSION: {version} instead of {KVM_API_VERSION}"));
    }
    if let Err(e) = kvm.create_vm() {
        return unusable(format!("KVM_CREATE_VM: {}", io::Error::from_raw_os_error(e.errno())));
    }
    match feature {
        Some(feature) => KvmStatus::Ready { feature },
        None => KvmStatus::NoHardwareVirtualization,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_kvm_is_told_from_what_is_not_there() {
        let feature = || Some("svm".to_owned());
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            check_device(&dir.path().join("kvm"), feature()),
            KvmStatus::Missing { feature: feature() }
        );
        let null = check_device(Path::new("/dev/null"), feature());
        assert!(
            matches!(&null, KvmStatus::Unusable { problem } if problem.contains("KVM_GET_API_VERSION")),
            "{null:?}"
        );
        assert!(!null.works() && null.traits().is_empty());
    }

    #[test]
    fn the_processors_feature_is_found_among_its_flags_only() {
        assert_eq!(virtualization_feature("model name : svm\nflags\t\t: fpu vmx sse\n"), Some("vmx".into()));
        assert_eq!(virtualization_feature("flags : fpu svm_lock sse\n"), None);
        assert_eq!(virtualization_feature(""), None);
    }

    #[test]
    fn every_status_but_ready_says_what_to_do() {
        let ready = KvmStatus::Ready { feature: "svm".into() };
        assert!(ready.message().is_empty());
        assert_eq!(ready.traits(), ["CUSTOM_KVM", "CUSTOM_HW_VIRTUALIZATION", "HW_CPU_X86_SVM"]);
        for status in [
            KvmStatus::NoHardwareVirtualization,
            KvmStatus::Missing { feature: None },
            KvmStatus::Missing { feature: Some("vmx".into()) },
            KvmStatus::NoPermission,
            KvmStatus::Unusable { problem: "x".into() },
        ] {
            assert!(status.message().contains(KVM_DEVICE), "{status:?}");
        }
    }

    #[test]
    fn this_machine_gets_a_verdict() {
        let status = check();
        if !status.works() {
            eprintln!("SKIPPED: {}", status.message());
            return;
        }
        assert!(status.traits().contains(&"CUSTOM_KVM".to_owned()));
    }
}
