//! Typed ids. All are UUIDs, written in lower case with hyphens (`Display`, JSON).

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new random id (UUID v4).
            pub fn new() -> Self {
                Self(Uuid::new_v4())
            }
        }

        impl Default for $name {
            /// The nil UUID, which is no object's.
            fn default() -> Self {
                Self(Uuid::nil())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                s.parse().map(Self)
            }
        }
    };
}

id!(/// A server (Nova).
    ServerId);
id!(/// A host.
    HostId);
id!(/// One installation: all controllers over one database.
    CloudId);
id!(/// A network (Neutron).
    NetworkId);
id!(/// A subnet (Neutron).
    SubnetId);
id!(/// A port (Neutron).
    PortId);
id!(/// An image (Glance).
    ImageId);
id!(/// A security group (Neutron).
    SecurityGroupId);
id!(/// A named set of addresses: the members of a security group, or an address group.
    AddressSetId);
id!(/// A router (Neutron).
    RouterId);
id!(/// A floating IP (Neutron).
    FloatingIpId);
id!(/// One question of the controller to a host.
    RequestId);
