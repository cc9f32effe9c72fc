/* Shows the OpenAPI document in Swagger UI. */
SwaggerUIBundle({ url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true });
